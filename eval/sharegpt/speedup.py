"""Measure a CLLM's speed on chat: python speedup.py --test_model PATH --max_new_tokens 16 --filename ShareGPT.json"""

from cllm.cli import speedup

if __name__ == "__main__":
    speedup.main(task="sharegpt")
