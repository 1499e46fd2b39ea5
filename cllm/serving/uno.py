"""Which consistency adapters SGLang's UNO algorithm takes (sglang 0.5.23; arXiv 2609.04010), and how it is started with one.

UNO reads an ordinary peft adapter. One forward drafts: the last verified token with the adapter off, then tokens drawn from the
whole vocabulary with it on; the next one, with the adapter off, verifies. ``cllm.reference.decode_two_passes`` is this layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, read_adapter
from cllm.errors import UsageError
from cllm.models import DEFAULT_GUESS, DEFAULT_WIDTH, TRAINED_GUESS

START = "uniform"  # what UNO's windows start from
FILES = (ADAPTER_WEIGHTS, "config.json", ADAPTER)  # a tokenizer's files would be taken for added tokens
LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


def check(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UsageError for an adapter that UNO would not load, or would draft badly with."""
    start = record.get(TRAINED_GUESS) or DEFAULT_GUESS
    if start != START:
        raise UsageError(
            f"UNO starts from random tokens of the vocabulary, and this adapter was trained to start from {start!r}, so it "
            f"would draft badly there; train one with --guess {START} (`cllm make`, or `cllm collect`)"
        )
    other = [name for name in read_adapter(folder).down if not LAYERS.fullmatch(name)]
    if other:
        raise UsageError(f"UNO adapts the linear layers of attention and MLP alone, and this adapter also has {other[0]}")


def usage(record: Mapping[str, Any]) -> str:
    """The section of the model card."""
    width = record.get("block_size") or DEFAULT_WIDTH  # the stored one is another device's
    return f"""## Use in SGLang

```bash
python -m sglang.launch_server --model-path {record.get("target_model")} --attention-backend fa3 \\
  --speculative-algorithm UNO --uno-lora-path PATH --speculative-num-draft-tokens {width}
```

SGLang's UNO needs one CUDA GPU with FlashAttention 3. Written for sglang 0.5.23 and not run on it: the layout was checked with
a plain decoder of the toolkit's own. UNO drafts and verifies in two forwards, every time from random tokens, so it has fewer
tokens per forward than the toolkit's own decoding."""
