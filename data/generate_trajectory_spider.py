"""Collect a target model's Jacobi trajectories on Spider; see ``--help``."""

from cllm.cli import collect

if __name__ == "__main__":
    collect.main(task="spider")
