"""Collect a target model's Jacobi trajectories on CodeSearchNet-Python; see ``--help``."""

from cllm.cli import collect

if __name__ == "__main__":
    collect.main(task="code_search_net")
