"""Options as dataclasses: Python code sets the fields, and commands make a command-line option of each.

A field's ``metadata`` says what its type and default do not: ``help`` (a field without it is no command-line option), ``flag``
(the option's name where it differs from the field's; without dashes it is positional) and ``least`` (the lowest value). Anything
else goes to argparse. This module imports neither torch nor transformers, so ``--help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from cllm.errors import UsageError
from cllm.prompts import DIALOGUES

if TYPE_CHECKING:
    from cllm.decoding import Sampling

Dtype = Literal["float32", "bfloat16", "float16"]
Maskable = Literal["sdpa", "eager"]
Start = Literal["context", "uniform", "filler"]
STARTS: tuple[Start, ...] = get_args(Start)  # what trajectories can start from, and decoding fill its windows with
GUESSES = (*STARTS, "prompt_lookup", "pool")
Engine = Literal["cllm", "vllm"]
KEY = "CLLM_API_KEY"  # of the environment: what clients of a server send
AUTO = "auto"  # as a guess: measure and pick
PREFIX_BYTES = 1 << 30
LOSSLESS_BLOCK = 8  # the longest block that a consistency adapter learns from; windows in decoding may be wider
GUESS_HELP = (
    f"fresh guesses of Jacobi decoding: {', '.join(GUESSES)}, or some of them joined by +, as in prompt_lookup+pool, tried in that "
    f"order; {AUTO} measures and picks. They decide the speed, never the text; default: what `cllm tune` stored, else what the model "
    "was trained with"
)


def option(help: str, default: Any, **more: Any) -> Any:
    """A field with a default that commands offer; ``more`` metadata: see above."""
    return field(default=default, metadata={"help": help} | more)


class Option(NamedTuple):
    """A field that commands offer."""

    name: str
    kind: type  # of one value
    choices: tuple[str, ...]  # () for any value
    several: bool  # the field holds a sequence
    field: Field[Any]


def options_of(kind: type[Any]) -> list[Option]:
    """The command-line options of a dataclass, in the order of its fields."""
    hints = get_type_hints(kind)
    return [Option(each.name, *_value(hints[each.name]), each) for each in fields(kind) if "help" in each.metadata]


def _value(hint: Any) -> tuple[type, tuple[str, ...], bool]:
    """What a type says of a value: its class, the choices, and whether there are several."""
    given = [each for each in get_args(hint) if each is not NoneType]
    if get_origin(hint) is Literal:
        return str, tuple(given), False
    if get_origin(hint) is Sequence:
        return *_value(given[0])[:2], True
    return _value(given[0]) if given else (hint, (), False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of options. Raises UsageError for a value that is out of range or not among the choices."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value, least = getattr(self, option.name), option.field.metadata.get("least")
            for each in value if option.several else [value]:
                if each is None:
                    continue
                if option.choices and each not in option.choices:
                    raise UsageError(f"{option.name} must be one of {', '.join(option.choices)}, got {each!r}")
                if least is not None and each < least:
                    raise UsageError(f"{option.name} must be >= {least}, got {each}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, and how to load it."""

    model: str = field(metadata={"help": "checkpoint folder or hub name", "metavar": "PATH"})
    dtype: Dtype | None = option("default: bfloat16 on a GPU, float32 elsewhere", None)
    device: str | None = option("default: cuda where there is a GPU, else cpu", None)
    attn_implementation: Maskable | None = option("default: the model's own", None)
    prompt_template: str | None = option(
        f"chat (the tokenizer's), plain (the task's), {', '.join(DIALOGUES)}, or a text with {{question}}; "
        "default: what the checkpoint was trained with, else chat where the tokenizer has it, else plain",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Which task, and its data."""

    task: str  # a name that `cllm tasks` lists
    task_options: Mapping[str, Any] = field(default_factory=dict)  # the task's own, by the names of their command-line options
    filename: str | None = option("local data, plain or .gz; default: the hub dataset", None)


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(Options):
    """The memory for prefix reuse."""

    prefix_cache: int = option(
        "memory for keys and values of earlier texts; prompts that start like one of them skip that part; 0: none",
        PREFIX_BYTES,
        least=0,
        metavar="BYTES",
    )


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(PrefixOptions):
    """How windows are filled."""

    guess: str | None = option(GUESS_HELP, None, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How tokens are chosen; by default greedily."""

    temperature: float = option("0 is greedy decoding; above it, tokens are drawn", 0.0)
    top_k: int = option("draw from the k most likely tokens only; 0: from all", 0)
    top_p: float = option("draw from the most likely tokens that have this probability together", 1.0)
    min_p: float = option("draw from tokens at least this times as likely as the likeliest", 0.0)
    repetition_penalty: float = option("on tokens of the prompt and the reply so far; 1: none", 1.0)

    def sampling(self, seed: int = 0) -> Sampling:
        """These options with a seed. Raises UsageError for a value that is out of range."""
        from cllm.decoding import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed)
