"""What `cllm speedup --explain` says of a sound decoder, and of three faults that are put in."""

import time

import pytest
import torch
from cases import generate
from tiny import random_adapter, tiny_model

from cllm.adapter import Adapter, attach
from cllm.attention import cache_argument
from cllm.decoding import JacobiDecoder
from cllm.decoding.cache import RowCache
from cllm.decoding.guess import STARTS
from cllm.evaluation.explain import Explanation, Share, explain, render_explanation
from cllm.evaluation.method import build_methods
from cllm.evaluation.method_name import AR
from cllm.evaluation.speed import measure
from cllm.training.arguments import LosslessTrainingArguments
from cllm.training.drafts import DraftCollator, DraftDataset
from cllm.training.lora import AdapterArguments, add_adapter, current_adapter
from cllm.training.lossless import LosslessTrainer
from cllm.trajectory.record import TrajectoryRow

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, WIDTH, LENGTH = 97, 4, 24
PROMPTS = [[5 + row, 9, 13 + 2 * row, 60 - row] for row in range(4)]


def plain_model():
    return tiny_model(vocab_size=VOCABULARY, eos_token_id=None)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """It knows the model's responses to these prompts by heart, and was trained to start from ``filler`` tokens alone."""
    folder, model, rows = tmp_path_factory.mktemp("learned"), plain_model(), []
    for number, prompt in enumerate(PROMPTS):
        response = generate(model, prompt, LENGTH, [])
        rows.append(TrajectoryRow(str(number), prompt, response, [0], [[response]]))
    args = LosslessTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        num_train_epochs=120,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    trained = add_adapter(model, AdapterArguments(lora_r=16), seed=0)
    LosslessTrainer(
        model=trained,
        args=args,
        train_dataset=DraftDataset(rows, WIDTH, 8, STARTS["filler"](VOCABULARY)),
        data_collator=DraftCollator(0),
    ).train()
    adapter = current_adapter(trained)
    copies = ({name: weight.clone() for name, weight in weights.items()} for weights in (adapter.down, adapter.up))
    return Adapter(*copies)


def explained(model, adapter, guess: str = "filler", prompts: list[list[int]] = PROMPTS) -> Explanation:
    attach(model, adapter)
    strategy = JacobiDecoder(model, WIDTH, guess=guess).guess
    methods = build_methods(model, [], block_size=WIDTH, guesses=[strategy], eos_ids=[])
    batches = [[prompt] for prompt in prompts]
    return explain(methods[0], measure(methods, batches, LENGTH), prompts, batches)


def kinds(found: Explanation) -> set[str]:
    return {finding.partition(":")[0] for finding in found.findings}


def test_a_sound_decoder(learned: Adapter) -> None:
    found = explained(plain_model(), learned)
    assert not kinds(found) & {"cache", "start", "near-ties"} and not found.differences
    assert found.replayed.right == found.replayed.total > 100
    assert [cost.width for cost in found.iterations] == [1, 2, 4] and found.iterations[0].times_width_1 == 1.0
    assert [cost.drafts for cost in found.iterations] == [0, 1, 3]
    assert len(found.acceptance) == WIDTH - 1 and found.forced["filler"][0].value > 0.5
    assert 0 < found.prefill_share < 1 and 0 < found.cold_windows.value < 1
    assert found.gain_cold >= 1 and found.gain_warm >= 1 and found.start == "filler"
    assert "100.0% of which are the same" in (text := render_explanation(found.as_dict())) and "from filler *" in text


def test_another_start_than_in_training(learned: Adapter) -> None:
    found = explained(plain_model(), learned, guess="context")
    assert "start" in kinds(found) and "cache" not in kinds(found)
    assert "trained to start from 'filler'" in next(finding for finding in found.findings if finding.startswith("start:"))


def test_a_forward_whose_cost_grows_with_its_tokens(learned: Adapter) -> None:
    def slow(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get(cache_argument(model)) is not None:  # of the decoder's
            time.sleep(0.02 * kwargs["input_ids"].shape[1])

    model = plain_model()
    model.register_forward_pre_hook(slow, with_kwargs=True)
    found = explained(model, learned, prompts=PROMPTS[:1])
    assert "width" in kinds(found) and found.iterations[-1].times_width_1 > 2
    assert not kinds(found) & {"cache", "start"}


def test_a_cache_written_one_slot_off(learned: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RowCache.place

    def off(self, slots_BT: torch.Tensor, length: int, first: int) -> None:
        place(self, (slots_BT + 1).clamp(max=length - 1), length, first)

    monkeypatch.setattr(RowCache, "place", off)
    found = explained(plain_model(), learned)
    assert "cache" in kinds(found) and {d.method for d in found.differences} >= {AR}
    assert all(not d.numerics and d.choice != d.plain_choice for d in found.differences)


def test_draft_tokens_written_one_slot_off(learned: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text stays right; drafts do not see themselves any more."""
    place = RowCache.place

    def off(self, slots_BT: torch.Tensor, length: int, first: int) -> None:
        drafts = slots_BT.shape[1] == 2 * WIDTH - 1
        late = torch.arange(slots_BT.shape[1]) >= WIDTH
        place(self, torch.where(late & drafts, (slots_BT - 2).clamp(min=0), slots_BT), length, first)

    monkeypatch.setattr(RowCache, "place", off)
    found = explained(plain_model(), learned)
    assert "cache" in kinds(found) and found.replayed.value < 0.8


def test_a_decoder_without_an_adapter() -> None:
    """A plain model, and width 1, which guesses nothing."""
    model = plain_model()
    found = explained(model, None)
    assert [cost.drafts for cost in found.iterations] == [0, 0, 0] and len(found.forced["filler"]) == WIDTH - 1
    assert found.replayed.right == found.replayed.total > 100 and not kinds(found) & {"cache", "start"}
    methods = build_methods(model, [], block_size=1, guesses=[], eos_ids=[])
    alone = explain(methods[0], measure(methods, [PROMPTS[:1]], LENGTH), PROMPTS[:1], [PROMPTS[:1]])
    assert not alone.forced and not alone.acceptance and not alone.replayed.total
    assert [cost.width for cost in alone.iterations] == [1]


def test_shares() -> None:
    assert Share(0, 0).value is None and not Share(0, 0).above(Share(1, 2))
    assert Share(60, 64).above(Share(20, 64)) and not Share(3, 4).above(Share(2, 4))
    assert not Share(640, 1000).above(Share(560, 1000))


def test_a_random_adapter_is_no_fault_of_the_cache() -> None:
    model = plain_model()
    assert "cache" not in kinds(explained(model, random_adapter(model)))
