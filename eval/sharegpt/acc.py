"""Answer MT-bench with a CLLM: python acc.py --model_dir PATH --use_consistency_decoding --filename question.jsonl"""

from cllm.cli import acc

if __name__ == "__main__":
    acc.main(task="sharegpt")
