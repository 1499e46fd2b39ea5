"""``cllm generate``: answer a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.cli.command import add_options, command, parser, read
from cllm.serving.arguments import GenerateArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(
        "Answer a file of prompts by Jacobi decoding with continuous batching. An interrupted run resumes where it stopped.",
        "cllm generate",
    )
    add_options(options, GenerateArguments)
    args = read(GenerateArguments, vars(options.parse_args(argv)))
    from cllm.serving.offline import generate_file

    replies, unanswered = generate_file(args)
    print(f"{replies} replies in {args.output}")
    for reason, number in unanswered.items():
        print(f"  {number} {reason}")
