"""The plug-in's logic in a runner that does what vLLM's does in a step: no vLLM needed."""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

from cllm.decoding import JacobiDecoder
from cllm.engines import vllm as plugin
from cllm.engines.vllm import JacobiProposer, register
from cllm.errors import UsageError

LENGTH, ROOM, ROWS = 24, 128, 4  # new tokens, tokens of a text, requests in a step
pytestmark = pytest.mark.usefixtures("one_thread")


class RejectionSampler:
    """vLLM's, for greedy requests; it may change the logits in place, and cannot do without a draft."""

    def sampler(self, logits: torch.Tensor, sampling_metadata: Any) -> list[list[int]]:
        return [[token] for token in logits.argmax(dim=-1).tolist()]

    def forward(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> list[list[int]]:
        assert any(metadata.drafts)
        emitted, at = [], 0
        for drafts in metadata.drafts:
            choices = logits[at : at + len(drafts) + 1].argmax(dim=-1).tolist()
            right = next((n for n, draft in enumerate(drafts) if draft != choices[n]), len(drafts))
            emitted.append(choices[: right + 1])
            at += len(drafts) + 1
        logits.zero_()
        return emitted


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package called vllm with the parts that the plug-in looks at; the plug-in is loaded."""
    names = ("vllm", "vllm.platforms", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.rejection_sampler")
    parts: dict[str, Any] = {name: ModuleType(name) for name in names}
    parts["vllm"].__version__ = "0.32.0"
    parts["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    sampler = type("RejectionSampler", (), {"forward": RejectionSampler.forward, "sampler": RejectionSampler.sampler})
    parts["vllm.v1.sample.rejection_sampler"].RejectionSampler = sampler
    parts["vllm.v1.sample.rejection_sampler"].MAX_SPEC_LEN = 128
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    register()
    return parts["vllm"]


def config(record: dict[str, Any] | None = None, drafts: int = 7, v2: bool = False, **options: Any) -> SimpleNamespace:
    """What vLLM gives a proposer."""
    hf = tiny_model().config
    hf.cllm = {"block_size": 8} if record is None else record
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf, model="my-cllm", get_vocab_size=lambda: hf.vocab_size),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts),
        device_config=SimpleNamespace(device_type="cpu"),
        additional_config={"cllm": options} if options else {},
        use_v2_model_runner=v2,
    )


@dataclass
class Asked:
    """A request: its text, how much of it went through the model, and the drafts for the next step."""

    prompt: list[int]
    text: list[int] = field(default_factory=list)
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    steps: int = 0  # with a sample

    def __post_init__(self) -> None:
        self.text = list(self.prompt)

    @property
    def written(self) -> list[int]:
        return self.text[len(self.prompt) :]


class Runner:
    """Steps of requests in rows that move as requests come and go."""

    def __init__(self, model: Any, sampler: Any, proposer: JacobiProposer, chunk: int = ROOM) -> None:
        self.model, self.sampler, self.proposer, self.chunk = model, sampler, proposer, chunk
        self.token_ids = np.zeros((ROWS, ROOM), dtype=np.int32)
        self.lengths = np.zeros(ROWS, dtype=np.int32)

    def step(self, requests: list[Asked], forbids: Callable[[int], bool] = lambda draft: False) -> None:
        """One step of these requests; ``forbids``: drafts that a grammar does not take."""
        drafts = [self._schedule(request, forbids) for request in requests]
        ready = [request.computed + self.chunk >= len(request.text) for request in requests]
        logits = torch.cat([self._logits(request, tokens) for request, tokens in zip(requests, drafts)])
        metadata = SimpleNamespace(drafts=drafts, num_draft_tokens=[len(tokens) for tokens in drafts])
        emitted = self.sampler.forward(metadata, None, logits, None)
        emitted = [new if whole else [] for new, whole in zip(emitted, ready)]
        for row, (request, new) in enumerate(zip(requests, emitted)):
            request.computed = len(request.text) + len(new) - 1 if new else request.computed + self.chunk
            request.text += new
            request.steps += bool(new)
            self.token_ids[row, : len(request.text)] = request.text
            self.lengths[row] = len(request.text)
        proposed = self.proposer.propose(emitted, self.lengths, self.token_ids, slot_mappings=None)
        for request, tokens in zip(requests, proposed, strict=True):
            request.drafts = tokens

    def _schedule(self, request: Asked, forbids: Callable[[int], bool]) -> list[int]:
        end = next((n for n, draft in enumerate(request.drafts) if forbids(draft)), len(request.drafts))
        return request.drafts[:end]

    def _logits(self, request: Asked, drafts: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([request.text + drafts])).logits[0, -len(drafts) - 1 :].clone()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=3)


def runner(vllm: Any, model: Any, chunk: int = ROOM, **options: Any) -> Runner:
    sampler = sys.modules["vllm.v1.sample.rejection_sampler"].RejectionSampler  # type: ignore[attr-defined]
    return Runner(model, sampler(), JacobiProposer(config(**options)), chunk)


def ar(model: Any, prompt: list[int], length: int = LENGTH) -> list[int]:
    (result,) = JacobiDecoder(model, 1).generate([prompt], max_new_tokens=length)
    return result.token_ids


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, 99) for _ in range(rng.randrange(3, 30))] for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("guess", ["context", "uniform", "filler", "prompt_lookup"])
def test_as_many_steps_as_our_engine_and_the_text_of_ar(vllm, model, guess) -> None:
    """Our engine has guesses in the prefill as well, so it goes on from the first token that vLLM chose."""
    decoder = JacobiDecoder(model, 8, guess=guess)
    for prompt in prompts(6):
        run, request = runner(vllm, model, guess=guess), Asked(prompt)
        run.step([request])
        (ours,) = decoder.generate([request.text], max_new_tokens=LENGTH - 1)
        while len(request.written) < LENGTH:
            run.step([request])
        assert request.written[:LENGTH] == request.written[:1] + ours.token_ids == ar(model, prompt)
        assert guess == "prompt_lookup" or request.steps - 1 == ours.forwards


def test_requests_that_join_leave_are_preempted_and_come_in_chunks(vllm, model) -> None:
    run, rng = runner(vllm, model, chunk=5), random.Random(2)
    waiting, running, done = [Asked(prompt) for prompt in prompts(14)], [], []
    aborted = 0
    while waiting or running:
        if waiting and len(running) < ROWS and rng.random() < 0.5:
            running.append(waiting.pop())
        if not running:
            continue
        event = rng.random()
        if event < 0.1:  # preempted: its keys and values go, and so do its drafts
            request = running.pop(rng.randrange(len(running)))
            request.computed, request.drafts = 0, []
            waiting.append(request)
        elif event < 0.13:
            running.pop(rng.randrange(len(running)))
            aborted += 1
        rng.shuffle(running)  # rows move
        if running:
            run.step(running, forbids=lambda draft: rng.random() < 0.05)
        done += [request for request in running if len(request.written) >= LENGTH]
        running = [request for request in running if len(request.written) < LENGTH]
    assert len(done) + aborted == 14 and len(done) > 8
    for request in done:
        assert request.written[:LENGTH] == ar(model, request.prompt)


def test_a_step_that_nobody_asks_about_costs_speed_only(vllm, model) -> None:
    """Warm-up and texts near vLLM's limit run the sampler without the proposer."""
    run, prompt = runner(vllm, model), prompts(1)[0]
    for rows in (1, 3):
        metadata = SimpleNamespace(drafts=[[1] * 5] * rows, num_draft_tokens=[5] * rows)
        run.sampler.forward(metadata, None, torch.randn(6 * rows, 99), None)
        request = Asked(prompt)
        while len(request.written) < LENGTH:
            run.step([request])
        assert request.written[:LENGTH] == ar(model, prompt)


def test_nothing_is_kept_of_a_request(vllm, model) -> None:
    run = runner(vllm, model)
    before = set(vars(run.proposer))
    for prompt in prompts(3):
        run.step([request := Asked(prompt)])
        run.step([request])
        assert plugin._step.choices is None and set(vars(run.proposer)) == before


def test_many_requests_have_fewer_drafts(vllm) -> None:
    proposer = JacobiProposer(config(drafts=15, step_tokens=16))
    assert [proposer.drafts_for(requests) for requests in (1, 2, 4, 8, 9, 16, 100)] == [15, 7, 3, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"guess": "uniform"}, "uniform"),
        ({"guess": "uniform", "decoding_guess": "prompt_lookup+pool"}, "prompt_lookup"),
        ({"guess": "uniform", "decoding_guess": "pool"}, "uniform"),
        ({"decoding_guess": "pool+prompt_lookup+filler"}, "prompt_lookup+filler"),
    ],
)
def test_the_guesses_are_the_checkpoints(vllm, record, name) -> None:
    assert JacobiProposer(config(record=record)).guess.name == name


def test_a_process_without_a_proposer_is_not_watched(vllm, monkeypatch) -> None:
    monkeypatch.setattr(plugin._Step, "watched", False)
    sampler = sys.modules["vllm.v1.sample.rejection_sampler"].RejectionSampler()  # type: ignore[attr-defined]
    sampler.forward(SimpleNamespace(drafts=[[1]], num_draft_tokens=[1]), None, torch.randn(2, 9), None)
    assert plugin._step.choices is None


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config(drafts=129), "num_speculative_tokens must be between 1 and 128, got 129"),
        (config(v2=True), "VLLM_USE_V2_MODEL_RUNNER=0"),
        (config(record={"lossless": True}), "`cllm serve`, or in SGLang"),
        (config(guess="pool"), "choose another"),
        (config(guess="nothing"), "unknown guess 'nothing'"),
        (config(step_tokens=0), "step_tokens must be an integer >= 1, got 0"),
        (config(width=4), "unknown options width"),
    ],
)
def test_refusals(vllm, made, message) -> None:
    with pytest.raises(UsageError, match=message):
        JacobiProposer(made)


def test_another_version_signature_or_no_plugin(vllm, monkeypatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(UsageError, match=r"works with vLLM 0\.32, and this is 0\.33\.1"):
        JacobiProposer(config())
    monkeypatch.setattr(vllm, "__version__", "0.32.1")
    sampler = sys.modules["vllm.v1.sample.rejection_sampler"].RejectionSampler  # type: ignore[attr-defined]
    monkeypatch.setattr(sampler, "forward", RejectionSampler.forward)
    with pytest.raises(UsageError, match="has not loaded the plug-in"):
        JacobiProposer(config())
    monkeypatch.setattr(sampler, "forward", lambda self, logits: None)
    register()
    with pytest.raises(UsageError, match="takes self, logits; Jacobi decoding needs self, metadata"):
        JacobiProposer(config())


def test_a_model_that_is_no_cllm_is_warned_of(vllm, caplog) -> None:
    JacobiProposer(config(record={}))
    assert "my-cllm is no CLLM" in caplog.text


def test_without_vllm_the_plugin_does_nothing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.rejection_sampler", None)
    register()


def test_a_value_of_each_request_for_each_of_its_tokens(vllm) -> None:
    """vLLM's own function does not do this on a CPU, so the plug-in's stands in its place."""
    expand = sys.modules["vllm.v1.sample.rejection_sampler"].expand_batch_to_tokens
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert expand(torch.tensor([0.5, 7.0, 0.0]), cumulative, 5, 0, 1).tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert expand(torch.tensor([3, 9, 40], dtype=torch.int32), cumulative, 5).tolist() == [3, 3, 40, 40, 40]
