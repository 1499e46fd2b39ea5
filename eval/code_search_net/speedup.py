"""Measure a CLLM's speed on code: python speedup.py --test_model PATH --max_new_tokens 16 --filename HumanEval.jsonl.gz"""

from cllm.cli import speedup

if __name__ == "__main__":
    speedup.main(task="code_search_net")
