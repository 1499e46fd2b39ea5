"""Collect a target model's Jacobi trajectories on GSM8K; see ``--help``."""

from cllm.cli import collect

if __name__ == "__main__":
    collect.main(task="gsm8k")
