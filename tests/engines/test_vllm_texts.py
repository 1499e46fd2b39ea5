"""vLLM with the plug-in against the same vLLM without it, in float32."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sql_questions import main as write_sql_questions
from tiny import EOS_ID, save_tiny_adapter

from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.models import load_model, load_tokenizer, stop_token_ids
from cllm.prompts import PromptTemplate
from cllm.tasks import get_task
from cllm.tasks.source import load_examples

LENGTH, WIDTH = 32, 8
SCRIPT = Path(__file__).with_name("vllm_texts.py")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}}}
SCHEMA |= {"required": ["city", "count"], "additionalProperties": False}
pytest.importorskip("vllm", reason="no vLLM; scripts/vllm_check.sh makes an environment with it")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def prompts(real_model: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """60 SQL questions, and where the data is 60 of GSM8K and 40 of MT-bench. $CLLM_VLLM_PROMPTS takes each so-many-th only."""
    sql = tmp_path_factory.mktemp("sql")
    write_sql_questions([str(sql), "60", "60"])
    sources = [("spider", sql, 60)]
    try:
        shared = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        pass
    else:
        sources += [("gsm8k", shared / "gsm8k" / "test.jsonl.gz", 60), ("sharegpt", shared / "mt_bench" / "question.jsonl", 40)]
    tokenizer, template = load_tokenizer(real_model), PromptTemplate("chat")
    ids = [
        template.encode(example.messages, tokenizer)
        for task, path, count in sources
        for example in load_examples(get_task(task), str(path), "test", count)
    ]
    return [prompt for prompt in ids if len(prompt) < 800][:: int(os.environ.get("CLLM_VLLM_PROMPTS", 1))]


def job(folder: Path, model: Any, drafts: int, runs: list[dict[str, Any]], **engine: Any) -> dict[str, Any]:
    """What vllm_texts.py finds; :class:`UsageError` with the last lines of its output where it fails."""
    folder.mkdir(exist_ok=True)
    asked, result = folder / f"job-{drafts}.json", folder / f"result-{drafts}.json"
    asked.write_text(json.dumps({"model": str(model), "drafts": drafts, "runs": runs, "engine": engine}))
    done = subprocess.run([sys.executable, SCRIPT, asked, result], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UsageError(done.stdout[-20_000:])
    return json.loads(result.read_text())


def both(folder: Path, model: Any, runs: list[dict[str, Any]], drafts: int = WIDTH - 1, **engine: Any) -> tuple[dict, dict]:
    """The results of AR and of Jacobi decoding, after a look at their texts."""
    plain, drafted = (job(folder, model, count, runs, **engine) for count in (0, drafts))
    for number, (expected, got) in enumerate(zip(plain["runs"], drafted["runs"], strict=True)):
        different = [n for n, (a, b) in enumerate(zip(expected["texts"], got["texts"], strict=True)) if a != b]
        assert not different, f"run {number}: {len(different)} of {len(got['texts'])} texts differ"
        assert not expected["steps"] and got["steps"]
    return plain, drafted


GREEDY = {"temperature": 0, "max_tokens": LENGTH}


def test_real_prompts_alone_and_together(real_model: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """With prefix caching, and prompts that are computed in chunks."""
    short = {"temperature": 0, "max_tokens": 16}  # a token alone costs as much as one of each of eight requests
    runs = [{"prompts": prompts, "sampling": short | {"max_tokens": 12}, "alone": True}, {"prompts": prompts, "sampling": short}]
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    guess = {"additional_config": {"cllm": {"guess": "prompt_lookup"}}}
    _, drafted = both(tmp_path, real_model, runs, **engine, **guess)
    assert all(run["accepted"] > 0.1 * run["steps"] for run in drafted["runs"])


def test_requests_that_are_preempted(real_model: str, prompts: list[list[int]], tmp_path: Path) -> None:
    engine = {"max_num_seqs": 8, "num_gpu_blocks_override": 33, "block_size": 32, "enable_prefix_caching": False}
    runs = [{"prompts": prompts[:16], "sampling": {"temperature": 0, "max_tokens": 64, "ignore_eos": True}}]
    _, drafted = both(tmp_path, real_model, runs, **engine)
    assert drafted["preempted"] > 0


def test_a_random_model(random_model: Path, tmp_path: Path) -> None:
    """Nearly every guess fails; penalties, stops, a grammar and choices of tokens hold all the same."""
    some = [[(7 * n + k) % 90 + 5 for k in range(5 + n)] for n in range(16)]
    chosen = {
        "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        "stops": {"stop": ["a", "7"], "include_stop_str_in_output": True},
        "at least": {"min_tokens": 20, "stop_token_ids": [EOS_ID, 30, 31, 32]},
        "grammar": {"json": SCHEMA, "max_tokens": 60},
        "allowed": {"allowed_token_ids": list(range(20, 60))},
    }
    runs = [{"prompts": some, "sampling": GREEDY}, {"prompts": some, "sampling": GREEDY, "alone": True}]
    runs += [{"prompts": some, "sampling": GREEDY | more} for more in chosen.values()]
    plain, _ = both(tmp_path, random_model, runs, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512)
    model = load_model(str(random_model), device="cpu")
    stops = stop_token_ids(model, load_tokenizer(str(random_model)))
    ours = JacobiDecoder(model, 1, eos_token_ids=stops).generate(some[:1], max_new_tokens=LENGTH)
    assert plain["runs"][0]["texts"][0] == [ours[0].token_ids]  # so vLLM has the model that we have


def test_drawn_texts(random_model: Path, tmp_path: Path) -> None:
    """A seed gives the same texts again, several choices differ, and tokens are as frequent as without the plug-in."""
    drawn = {"temperature": 1.0, "max_tokens": 4, "seed": 1, "ignore_eos": True}
    again = {"prompts": [[5, 6, 7], [8, 9]], "sampling": drawn | {"n": 2}, "alone": True}
    many = {"prompts": [[5, 6, 7]], "sampling": {**drawn, "n": 1500, "seed": None}}
    filtered = {"prompts": [[5, 6, 7]], "sampling": {**many["sampling"], "temperature": 1.5, "top_k": 12, "top_p": 0.9}}
    options = {"max_num_seqs": 64, "additional_config": {"cllm": {"step_tokens": 1024}}, "max_model_len": 512}
    results = {drafts: job(tmp_path, random_model, drafts, [again, again, many, filtered], **options)["runs"] for drafts in (0, 3)}
    first, second, *_ = results[3]
    assert first["texts"] == second["texts"] and all(a != b for a, b in first["texts"])
    for number, place in product((2, 3), range(4)):
        counts = [[text[place] for text in runs[number]["texts"][0]] for runs in results.values()]
        for token in set(counts[0] + counts[1]):
            shares = [texts.count(token) / len(texts) for texts in counts]
            assert abs(shares[0] - shares[1]) < 0.08, (number, place, token, shares)  # four standard deviations at one half


def test_tokens_per_step_are_those_of_our_engine(real_model: str, prompts: list[list[int]], tmp_path: Path) -> None:
    """Our engine has guesses in the prefill as well, so it goes on from the first token that vLLM chose."""
    some = prompts[::10]
    runs = [{"prompts": some, "sampling": GREEDY | {"ignore_eos": True}, "alone": True}]
    (run,) = job(tmp_path, real_model, WIDTH - 1, runs)["runs"]
    decoder = JacobiDecoder(load_model(real_model, dtype="float32", device="cpu"), WIDTH, guess="context")
    forwards = sum(
        decoder.generate([prompt + text[:1]], max_new_tokens=LENGTH - 1)[0].forwards for prompt, (text,) in zip(some, run["texts"])
    )
    assert run["steps"] == pytest.approx(forwards, rel=0.03)


def test_two_workers_that_share_the_model(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself vLLM wants a memory node for each worker
    some = [[(7 * n + k) % 90 + 5 for k in range(5 + n)] for n in range(8)]
    both(tmp_path, random_model, [{"prompts": some, "sampling": GREEDY}], tensor_parallel_size=2, max_model_len=256)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("drafts", "environment", "message"),
    [
        (-1, {}, "num_speculative_tokens"),
        (200, {}, "num_speculative_tokens must be between 1 and 128, got 200"),
        (3, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "custom_class"),
        (3, {"VLLM_PLUGINS": ""}, "has not loaded the plug-in cllm"),
    ],
)
def test_refused_at_the_start(random_model: Path, tmp_path: Path, monkeypatch, drafts, environment, message) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        job(tmp_path, random_model, drafts, [])


def test_a_lossless_adapter_is_refused(random_model: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", random_model)
    with pytest.raises(UsageError, match="Serve it with `cllm serve`, or in SGLang after `cllm export --format uno`"):
        job(tmp_path / "job", adapter, 3, [])
