"""Measure a CLLM's speed on GSM8K: python speedup.py --test_model PATH --max_new_tokens 16 --filename ./test.jsonl"""

from cllm.cli import speedup

if __name__ == "__main__":
    speedup.main(task="gsm8k")
