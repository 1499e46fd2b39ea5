"""Greedy Jacobi decoding equals AR decoding for all kinds of models, widths, batches, paddings and stop tokens."""

import random

import pytest
import torch
from tiny import KINDS, Successor, tiny_tokenizer
from tiny import tiny_model as any_tiny_model
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration, TextStreamer

from cllm.decoding import JacobiDecoder
from cllm.errors import UnsupportedModelError, UsageError

CASES_PER_KIND = 30  # 180 over all kinds
GUESSES = ("context", "filler", "prompt_lookup", "pool", "pool+prompt_lookup", "prompt_lookup+pool+filler")


def tiny_model(kind: str = "llama", seed: int = 0, **changes):
    """A model without an end-of-sequence id, with 97 tokens."""
    return any_tiny_model(kind, seed, **{"vocab_size": 97, "eos_token_id": None} | changes)


def reference(model, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    """Hugging Face's greedy decoding, without its padding."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def padded(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p if side == "left" else p + [0] * (longest - len(p)) for p in prompts]
    masks = [[0] * (longest - len(p)) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * (longest - len(p)) for p in prompts]
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate(kind):
    """Seeds, widths 1 to 33, batches of 1 to 5, both paddings, both windows, all guesses; EOS early, late, never."""
    checked = 0
    for case in range(CASES_PER_KIND):
        draw = random.Random(f"{kind} {case}")
        model = tiny_model(kind, seed=case % 12)
        prompts = [[draw.randrange(1, 97) for _ in range(draw.randint(1, 30))] for _ in range(draw.randint(1, 5))]
        new_tokens, width = draw.randint(1, 45), draw.randint(1, 33)
        free = [reference(model, prompt, new_tokens, []) for prompt in prompts]
        eos = draw.choice([[], [free[0][0]], [free[-1][-1], 3], [free[0][len(free[0]) // 2]]])
        expected = [cut(text, eos) for text in free]
        window, guess = draw.choice(["sliding", "sliding", "block"]), draw.choice(GUESSES)
        decoder = JacobiDecoder(model, width, eos_token_ids=eos, window=window, guess=guess)
        results = decoder.generate(*padded(prompts, draw.choice(["left", "right"])), max_new_tokens=new_tokens)
        assert [r.token_ids for r in results] == expected, case
        for result in results:
            assert sum(result.accepted) == len(result.token_ids)
            assert len(result.accepted) == result.forwards
            assert result.stop == ("eos" if result.token_ids[-1] in eos else "length")
        checked += 1
    assert checked == CASES_PER_KIND


def cut(text: list[int], eos: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(text) if token in eos), None)
    return text if end is None else text[: end + 1]


def test_eager_attention_equals_sdpa():
    model = tiny_model("gemma3")
    prompts = [[5, 6, 7, 8], [9] * 20]
    expected = [r.token_ids for r in JacobiDecoder(model, 6).generate(prompts, max_new_tokens=30)]
    model.set_attn_implementation("eager")
    assert [r.token_ids for r in JacobiDecoder(model, 6).generate(prompts, max_new_tokens=30)] == expected


def test_ar_is_width_one():
    (result,) = JacobiDecoder(tiny_model(), 1).generate([[1, 2, 3]], max_new_tokens=20)
    assert result.accepted == [1] * 20
    assert result.tokens_per_forward == 1.0
    assert result.fast_forwarded == result.stationary == 0


class Oracle:
    """A fresh guess that knows the text: each position is right with probability ``p``."""

    def __init__(self, text: list[int], p: float) -> None:
        self.text, self.p = torch.tensor(text), p

    def __call__(self, text_BS, known_B, positions_BK, seed_B):
        right = self.text[positions_BK.clamp(max=len(self.text) - 1)]
        lucky = torch.tensor([[random.Random(int(p)).random() < self.p for p in row] for row in positions_BK], dtype=torch.bool)
        return torch.where(lucky, right, (right + 1) % 97)


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_guesses_affect_speed_never_output(window, p):
    model, prompt = tiny_model(), [4, 8, 15, 16, 23, 42]
    expected = reference(model, prompt, 64, [])
    guess = Oracle(prompt + expected, p)
    (result,) = JacobiDecoder(model, 8, window=window, guess=guess).generate([prompt], max_new_tokens=64)
    assert result.token_ids == expected
    if p == 1.0:
        assert result.forwards == 64 // 8
        assert result.fast_forwarded == 64 - 64 // 8
        assert result.stationary == 0  # no guess ever came after a wrong one


def test_fast_forwarded_and_stationary_on_a_hand_made_model():
    """With a model that says 'last token + 1', every guess after a wrong one is wrong, except by luck."""
    model = Successor()
    prompt = [10]

    def guess(text_BS, known_B, positions_BK, seed_B):
        right = 10 + positions_BK
        return torch.where((positions_BK == 1) | (positions_BK == 4), torch.zeros_like(right), right)

    # window: 10 | 0? no: position 1 guessed 0 (wrong), 2 -> 12, 3 -> 13 right, 4 wrong, 5.. right
    (result,) = JacobiDecoder(model, 4, guess=guess).generate([prompt], max_new_tokens=6)
    assert result.token_ids == [11, 12, 13, 14, 15, 16]
    # 1st forward: [10 0 12 13] -> choices 11 1 13 14: only 11 is verified, guesses move up to [11 1 13 14].
    # 2nd: [11 1 13 14] -> 12 2 14 15: 12 is verified; [12 2 14 15] -> 13 3 15 16 ...
    assert result.accepted[0] == 1
    assert result.fast_forwarded == sum(a - 1 for a in result.accepted)


def test_stationary_guesses_are_counted():
    """Position 3 is guessed right from the start, after a wrong guess at 2: it waits one iteration, then is accepted."""

    class Tail(Successor):
        """Says the position plus ten, whatever it sees."""

        def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep=0):
            ids, at = input_ids[:, -logits_to_keep:], position_ids[:, -logits_to_keep:]

            class Output:
                logits = torch.nn.functional.one_hot(at + 11, 97).float()

            assert ids.shape == at.shape
            return Output

    def guess(text_BS, known_B, positions_BK, seed_B):
        return torch.where(positions_BK == 2, torch.zeros_like(positions_BK), positions_BK + 10)

    # Window [10 | 11 0 13]: 11 is right, position 2 is wrong, position 3 after it is right. Choices: 11 12 13 14.
    # Verified: 11 and the correction 12. Next window [12 | 13 14 15]: 13 is stationary, 14 is new.
    (result,) = JacobiDecoder(Tail(), 4, guess=guess).generate([[10]], max_new_tokens=6)
    assert result.token_ids == [11, 12, 13, 14, 15, 16]
    assert result.accepted == [2, 4]
    assert result.stationary == 1
    assert result.fast_forwarded == 4


def test_block_mode_iterates_to_an_unchanged_state():
    model, prompt = tiny_model(seed=3), [1, 2, 3]
    iterations = list(JacobiDecoder(model, 5, window="block").iterate([prompt], max_new_tokens=5))
    states = [iteration.window_BW[0, 1:].tolist() for iteration in iterations]
    assert states[-1] == reference(model, prompt, 5, [])
    following = [iteration.choices_BW[0, :-1].tolist() for iteration in iterations]
    assert following[:-1] == states[1:]
    assert following[-1] == states[-1]  # a fixed point is recognised by a forward that changes nothing


def test_rows_do_not_depend_on_the_batch():
    model = tiny_model("qwen3", seed=5)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10] * 25]
    alone = [JacobiDecoder(model, 9).generate([p], max_new_tokens=30)[0] for p in prompts]
    assert JacobiDecoder(model, 9).generate(prompts, max_new_tokens=30) == alone


def test_stops_at_the_end_of_the_context():
    model = tiny_model(max_position_embeddings=40)
    (result,) = JacobiDecoder(model, 16).generate([[1] * 30], max_new_tokens=50)
    assert len(result.token_ids) == 10
    assert result.stop == "context"


def test_learned_positions_do_not_overflow_at_the_end_of_the_context():
    """GPT-2 looks positions up in a table, which must not be read beyond its end."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=40,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).eval()
    (result,) = JacobiDecoder(model, 16).generate([[1] * 30], max_new_tokens=50)
    assert result.token_ids == reference(model, [1] * 30, 10, [])


def test_streamer_gets_everything_in_pieces():
    model, tokenizer = tiny_model(vocab_size=99), tiny_tokenizer()

    class Recorder(TextStreamer):
        text = ""
        sizes: list[int] = []

        def put(self, value):
            self.sizes.append(value.numel())
            super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Recorder(tokenizer, skip_prompt=True)
    (result,) = JacobiDecoder(model, 8).generate([[65, 66]], max_new_tokens=40, streamer=streamer)
    assert streamer.text == tokenizer.decode(result.token_ids)
    assert sum(streamer.sizes) == 2 + 40
    assert streamer.sizes[1:] == [a for a in result.accepted if a]


def test_training_mode_is_restored():
    model = tiny_model().train()
    JacobiDecoder(model, 4).generate([[1]], max_new_tokens=4)
    assert model.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: JacobiDecoder(m, 0), "block_size must be between 1 and the context length 256, got 0"),
        (lambda m: JacobiDecoder(m, 257), "got 257"),
        (lambda m: JacobiDecoder(m, 4, window="round"), "'sliding' or 'block'"),
        (lambda m: JacobiDecoder(m, 4).generate([[]], max_new_tokens=4), "prompt 0 is empty"),
        (lambda m: JacobiDecoder(m, 4).generate([[1], [1] * 256], max_new_tokens=4), "prompt 1 has 256 tokens"),
        (lambda m: JacobiDecoder(m, 4).generate([[1]], max_new_tokens=0), "must be between 1 and 2147483647, got 0"),
        (lambda m: JacobiDecoder(m, 4).generate([[1]], max_new_tokens=1 << 31), "2147483647, got 2147483648"),
        (lambda m: JacobiDecoder(m, 4).generate([[1], [1, 97]], max_new_tokens=4), "between 0 and 96, and prompt 1 has 97"),
        (lambda m: JacobiDecoder(m, 4).generate([[3, -1, 2]], max_new_tokens=4), "between 0 and 96, and prompt 0 has -1"),
        (lambda m: JacobiDecoder(m, 4).generate([[1 << 70]], max_new_tokens=4), "between 0 and 96, and prompt 0 has 11805"),
        (lambda m: JacobiDecoder(m, 4).generate(torch.ones(3, dtype=torch.long), max_new_tokens=1), "shape"),
        (
            lambda m: JacobiDecoder(m, 4).generate([[1], [2]], max_new_tokens=4, streamer=TextStreamer(tiny_tokenizer())),
            "one prompt at a time, got 2",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UsageError, match=message):
        make(tiny_model())


def test_models_that_cannot_roll_back_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="cannot be rolled back"):
        JacobiDecoder(mamba, 4)


def test_attention_without_explicit_masks_is_refused():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        JacobiDecoder(model, 4)


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        JacobiDecoder(T5ForConditionalGeneration(config), 4)


def test_no_prompts_no_results():
    assert JacobiDecoder(tiny_model(), 4).generate([], max_new_tokens=4) == []
