"""Collect a target model's Jacobi trajectories on ShareGPT; see ``--help``."""

from cllm.cli import collect

if __name__ == "__main__":
    collect.main(task="sharegpt")
