"""Result files read back, and what is no result file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UsageError
from cllm.evaluation.results import Benchmark, Quality, read_results

REPOSITORY = Path(__file__).parents[2]
METHOD = {
    "tokens_per_forward": 1.5,
    "tokens_per_forward_interval": [1.4, 1.6],
    "tokens_per_second": 30.0,
    "speedup": 1.2,
    "speedup_interval": None,
}
SPEEDUP: dict[str, Any] = {
    "settings": {"test_model": "m", "target_model": "t", "task": "gsm8k", "block_size": 8},
    "environment": {"device_name": "a chip"},
    "labels": {"jacobi": "Jacobi 8", "ar": "AR", "generate": "HF generate"},
    "methods": {"jacobi": METHOD, "ar": METHOD | {"tokens_per_forward": 1.0}, "generate": METHOD},
    "prompts": [
        {"methods": {"jacobi": {"accepted": gains}, "ar": {"accepted": [1, 1]}, "generate": {"accepted": None}}} for gains in ([1, 2], [3])
    ],
    "quality": {
        "jacobi": {"score": 0.5, "score_interval": [0.4, 0.6]},
        "target": {"score": 0.25, "score_interval": None},
    },
}
ACCURACY = {
    "settings": {"task": "gsm8k", "model": "m"},
    "summary": {"scores": {"accuracy": {"mean": 0.5, "interval": [0.4, 0.6]}, "strict": {}}, "tokens_per_forward": 1.4},
}
TUNE = {
    "best": {},
    "choices": [{"guess": "context", "width": w, "batch_size": b, "tokens_per_forward": w / 4} for b in (1, 2) for w in (8, 4)],
}
STATE = {
    "log_history": [
        {"step": 2, "loss": 3.0, "ar_loss": 1.0, "grad_norm": 9.0},
        {"step": 4, "loss": 2.0},
        {"step": 4, "train_loss": 2.5},
    ]
}
BENCHMARK = {"benchmark": "iteration", "result": {"batch 1": {"ratio": 1.03}, "times": 2}}


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_a_run_of_speedup(tmp_path: Path) -> None:
    results = read_results(write(tmp_path, s=SPEEDUP))
    (speed,) = results.speeds
    assert (speed.name, speed.model, speed.task, speed.device, speed.width) == ("s.json", "m", "gsm8k", "a chip", 8)
    assert [method.gains for method in speed.methods] == [[1, 2, 3], [1, 1, 1, 1], []]
    assert [method.is_jacobi for method in speed.methods] == [True, False, False]
    assert speed.tokens_per_forward == 1.5
    assert results.qualities == [  # the target's score stands at the rate at which it was decoded
        Quality("s.json", "m", "gsm8k", 1.5, 0.5, (0.4, 0.6)),
        Quality("s.json", "t, AR", "gsm8k", 1.0, 0.25, None),
    ]


def test_the_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", trainer_state=STATE)
    results = read_results(write(tmp_path, a=ACCURACY, t=TUNE, b=BENCHMARK))
    assert results.qualities == [Quality("a.json", "m", "gsm8k", 1.4, 0.5, (0.4, 0.6))]
    assert results.widths[0].points == {"context": [(4, 1.0), (8, 2.0)]}
    assert results.trainings[0].name == "below/trainer_state.json"
    assert results.trainings[0].curves == {"loss": [(2, 3.0), (4, 2.0)], "ar_loss": [(2, 1.0)]}
    assert results.benchmarks == [Benchmark("b.json", "iteration", {"batch 1: ratio": 1.03, "times": 2})]
    assert sorted(results.files) == ["a.json", "b.json", "below/trainer_state.json", "t.json"] and not results.skipped


def test_what_is_skipped_and_why(tmp_path: Path) -> None:
    broken = copy.deepcopy(SPEEDUP)
    del broken["methods"]["ar"]["speedup"]
    write(tmp_path, good=BENCHMARK, broken=broken, config={"model_type": "llama"}, rows=[1], torn='{"a": ', empty="")
    write(tmp_path, unrated=ACCURACY | {"summary": ACCURACY["summary"] | {"tokens_per_forward": None}}, odd={"log_history": 3})
    (tmp_path / "answers.jsonl").write_text("{}\n")
    results = read_results(tmp_path)
    assert results.files == ["good.json"]
    assert {name: why.partition(" (")[0] for name, why in results.skipped.items()} == {
        "answers.jsonl": "not JSON",
        "broken.json": "looks like a result, but is damaged or of another version",
        "config.json": "of no known kind",
        "empty.json": "cannot be read as JSON",
        "odd.json": "looks like a result, but is damaged or of another version",
        "rows.json": "of no known kind",
        "torn.json": "cannot be read as JSON",
        "unrated.json": "looks like a result, but is damaged or of another version",
    }
    assert "speedup" in results.skipped["broken.json"]
    assert not results.speeds and not results.qualities  # nothing of a damaged file is kept


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no result files in .* \(0 other files\)"):
        read_results(tmp_path)
    with pytest.raises(UsageError, match=r"\(1 other files\)"):
        read_results(write(tmp_path, config={}))
    with pytest.raises(UsageError, match="expected a folder"):
        read_results(tmp_path / "none")


def test_the_repositorys_own_results_are_all_understood() -> None:
    results = read_results(REPOSITORY / "docs" / "results")
    assert not results.skipped and results.speeds and results.trainings and results.benchmarks
