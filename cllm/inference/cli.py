"""The form of the paper's README: ``python -m cllm.inference.cli --model PATH``."""

from cllm.cli.chat import main

if __name__ == "__main__":
    main()
