"""Measure a CLLM's pass@1 on HumanEval or MBPP: python acc.py --model_dir PATH --use_consistency_decoding --filename FILE"""

from cllm.cli import acc

if __name__ == "__main__":
    acc.main(task="code_search_net")
