"""Which consistency adapters SGLang's UNO algorithm takes (sglang 0.5.23; arXiv 2609.04010), and how to start it with one.

UNO reads ordinary peft adapters. One forward drafts, from the last verified token with the adapter off and random tokens of the
vocabulary with it on; the next forward, with the adapter off, verifies. ``cllm.reference.decode_two_passes`` does the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, read_adapter
from cllm.errors import UsageError
from cllm.models import DEFAULT_GUESS, DEFAULT_WIDTH, TRAINED_GUESS

START = "uniform"  # the fresh guesses of UNO's windows
FILES = (ADAPTER_WEIGHTS, "config.json", ADAPTER)  # UNO would read tokenizer files as added tokens
LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


def check(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UsageError for an adapter that UNO would not load or that would draft badly there."""
    start = record.get(TRAINED_GUESS) or DEFAULT_GUESS
    if start != START:
        raise UsageError(
            f"UNO starts from random tokens of the vocabulary, but this adapter was trained to start from {start!r}, so it "
            f"would draft badly there; train one with --guess {START} (`cllm make`, or `cllm collect`)"
        )
    other = [name for name in read_adapter(folder).down if not LAYERS.fullmatch(name)]
    if other:
        raise UsageError(f"UNO adapts only the linear layers of attention and MLP, but this adapter also has {other[0]}")


def usage(record: Mapping[str, Any]) -> str:
    """The model card's section on SGLang."""
    width = record.get("block_size") or DEFAULT_WIDTH  # the tuned width is for the toolkit's decoding on another device
    return f"""## Use in SGLang

```bash
python -m sglang.launch_server --model-path {record.get("target_model")} --attention-backend fa3 \\
  --speculative-algorithm UNO --uno-lora-path PATH --speculative-num-draft-tokens {width}
```

SGLang's UNO needs one CUDA GPU with FlashAttention 3. Written for sglang 0.5.23 but not run on it: the layout was checked with
a plain decoder in the toolkit. UNO needs two forwards, one to draft and one to verify, and always drafts from random tokens, so
it gets fewer tokens per forward than the toolkit's own decoding."""
