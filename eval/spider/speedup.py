"""Measure a CLLM's speed on Spider: python speedup.py --test_model PATH --max_new_tokens 16 --filename SPIDER_FOLDER"""

from cllm.cli import speedup

if __name__ == "__main__":
    speedup.main(task="spider")
