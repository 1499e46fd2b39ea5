"""Measure a CLLM's accuracy on Spider: python acc.py --model_dir PATH --use_consistency_decoding --filename SPIDER_FOLDER"""

from cllm.cli import acc

if __name__ == "__main__":
    acc.main(task="spider")
