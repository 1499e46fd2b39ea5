"""Measure a CLLM's accuracy on GSM8K: python acc.py --model_dir PATH --use_consistency_decoding --prompt_type math-single"""

from cllm.cli import acc

if __name__ == "__main__":
    acc.main(task="gsm8k")
