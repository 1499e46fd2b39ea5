"""Collection: the same rows under any interruption and any number of processes."""

import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import question_rows, write_rows
from tiny import EOS_ID, PAD_ID, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

from cllm.decoding.queue import LOOKAHEAD
from cllm.errors import UnsupportedModelError, UsageError
from cllm.tasks.base import Example, user_turn
from cllm.trajectory.collect import CollectionSettings, Collector, Prompt
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryWriter, read_rows, stored_counts

SETTINGS = CollectionSettings("tiny", "gsm8k", "chat", block_size=4, max_new_seq_len=12, use_aug=True, use_labels=True)
SEED = 3  # a tiny model with this seed gives a usable response to every question
TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}


def examples(count: int) -> list[Example]:
    return [Example(user_turn(row["question"]), row["answer"], id=f"q-{n}") for n, row in enumerate(question_rows(count))]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=SEED)


def collector(model: Any, settings: CollectionSettings = SETTINGS) -> Collector:
    return Collector(model, tiny_tokenizer(), settings)


def collect(folder: Path, model: Any, items: list[Example], **options: Any) -> dict[str, TrajectoryRow]:
    with TrajectoryWriter(folder, SETTINGS.as_dict(), resume=True) as writer:
        list(collector(model).run(items, writer, **{"batch_size": 3} | options))
    return rows_of(folder)


def collected(by: Collector, folder: Path) -> list[TrajectoryRow]:
    """The rows that a collector stores for three examples."""
    with TrajectoryWriter(folder, by.settings.as_dict(), resume=True) as writer:
        list(by.run(examples(3), writer, batch_size=3))
    return list(rows_of(folder).values())


def rows_of(folder: Path) -> dict[str, TrajectoryRow]:
    return {row.row_id: row for row in read_rows(folder)}


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrajectoryRow]:
    """The rows of an uninterrupted run of one process over 20 examples."""
    rows = collect(tmp_path_factory.mktemp("whole"), model, examples(20))
    assert len(rows) == 20
    return rows


# ---- what is stored ----


def test_rows(model: Any, whole: dict[str, TrajectoryRow]) -> None:
    tokenizer = tiny_tokenizer()
    for example in examples(20):
        row = whole[example.id]
        row.validate()
        assert tokenizer.decode(row.prompt_ids) == f"[user]{example.messages[0]['content']}\n[assistant]"
        assert example.reference is not None and row.label_ids is not None
        assert tokenizer.decode(row.label_ids) == example.reference + "<eos>"
        assert all(end - start <= 4 for start, end in row.spans())
        assert len(row.augmented) == len(row.trajectories)
    assert any(row.augmented != [[]] * len(row.trajectories) for row in whole.values())
    assert len({row.block_starts[1] for row in whole.values()}) == 4  # every alignment of the blocks occurs


def test_responses_are_greedy(model: Any, whole: dict[str, TrajectoryRow]) -> None:
    from cllm.decoding import JacobiDecoder

    decoder = JacobiDecoder(model, 1, eos_token_ids=[EOS_ID])
    for row in islice(whole.values(), 3):
        assert decoder.generate([row.prompt_ids], max_new_tokens=12)[0].token_ids == row.response_ids


def test_aligned_blocks_start_at_multiples_of_the_block_size(model: Any, tmp_path: Path) -> None:
    aligned = collector(model, replace(SETTINGS, aligned=True))
    rows = collected(aligned, tmp_path)
    assert len(rows) == 3 and all(row.block_starts == list(range(0, len(row.response_ids), 4)) for row in rows)


def test_without_options_nothing_extra_is_stored(model: Any, tmp_path: Path) -> None:
    plain = collector(model, replace(SETTINGS, use_aug=False, use_labels=False))
    rows = collected(plain, tmp_path)
    assert len(rows) == 3 and all(row.augmented == [] and row.label_ids is None for row in rows)


@pytest.mark.parametrize("guess", ["uniform", "filler"])
def test_trajectories_start_from_the_named_guesses(model: Any, tmp_path: Path, guess: str) -> None:
    rows = collected(collector(model, replace(SETTINGS, guess=guess)), tmp_path)
    starts = {token for row in rows for states in row.trajectories for token in states[0]}
    others = {token for row in rows for token in row.prompt_ids + row.response_ids}
    assert starts == {0} if guess == "filler" else len(starts - others) > 10
    assert replace(SETTINGS, guess=guess).as_dict()["guess"] == guess


def test_a_collection_older_than_an_option_resumes() -> None:
    assert "guess" not in SETTINGS.as_dict() and "task_options" not in SETTINGS.as_dict()
    with pytest.raises(UsageError, match="unknown starting guess 'pool'; choose from context, uniform, filler"):
        replace(SETTINGS, guess="pool")


# ---- interrupted, shared ----


@pytest.mark.parametrize("seed", range(3))
def test_resumed_equals_uninterrupted(model: Any, whole: dict[str, TrajectoryRow], tmp_path: Path, seed: int) -> None:
    """The run is stopped several times after a few batches and resumed with other batch sizes."""
    rng = random.Random(seed)
    for _ in range(4):
        with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
            run = collector(model).run(examples(20), writer, batch_size=rng.randint(1, 5))
            list(islice(run, rng.randint(0, 3)))
    assert collect(tmp_path, model, examples(20)) == whole


def test_resuming_with_more_data(model: Any, whole: dict[str, TrajectoryRow], tmp_path: Path) -> None:
    assert len(collect(tmp_path, model, examples(7))) == 7
    assert collect(tmp_path, model, examples(20)) == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_without_overlap(model: Any, whole: dict[str, TrajectoryRow], tmp_path: Path, processes: int) -> None:
    """A row made by two processes would be stored twice, in shards of different names."""
    for rank in range(processes):
        with TrajectoryWriter(tmp_path / str(rank), SETTINGS.as_dict(), resume=True, rank=rank) as writer:
            list(collector(model).run(examples(20), writer, batch_size=3, rank=rank, processes=processes))
    parts = [rows_of(tmp_path / str(rank)) for rank in range(processes)]
    assert sum(map(len, parts)) == 20 and all(parts)
    assert {key: row for part in parts for key, row in part.items()} == whole


def test_nothing_is_decoded_twice(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(tmp_path, model, examples(5))
    again = collector(model)
    monkeypatch.setattr(model, "forward", None)
    with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
        assert sum(again.run(examples(5), writer, batch_size=2)) == 5


# ---- left out, counted ----


def test_dropped_responses(model: Any) -> None:
    fine, loop, run = [5, 6, 7, 8], [9, 10, 11, 12] * 12, [7, *[5] * 10]
    responses = [(Prompt(f"q-{n}", [1, 2], None), ids) for n, ids in enumerate((fine, loop, [EOS_ID], run))]
    rows, dropped = collector(model, replace(SETTINGS, use_labels=False)).rows(responses)
    assert [row.response_ids for row in rows] == [fine]
    assert [drop.reason for drop in dropped] == ["loop", "empty response", "repeated token"]


def test_dropped_prompts(model: Any, tmp_path: Path) -> None:
    items = examples(4)
    items.append(replace(items[0], id="again"))
    items.append(Example(user_turn("x" * 256), "#### 1", id="long"))
    items.append(Example(user_turn("why?"), id="unanswered"))
    assert len(collect(tmp_path, model, items)) == 4
    assert stored_counts(tmp_path) == {
        "kept": 4,
        "dropped": {"duplicate prompt": 1, "no reference answer": 1, "prompt longer than the context": 1},
    }
    with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
        assert len(writer.done_ids) == 7  # dropped prompts are not tried again


def test_a_prompt_that_just_fits(model: Any, tmp_path: Path) -> None:
    """With the template it leaves two positions of the context, and the response is truncated to them."""
    length = 256 - 2 - len("[user]\n[assistant]")
    rows = collect(tmp_path, model, [Example(user_turn("x" * length), "#### 1", id="full")])
    assert not rows or len(rows["full"].response_ids) <= 2


def test_a_prompt_refused_by_the_template_is_dropped(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['content']) }}"
    with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
        list(Collector(model, tokenizer, SETTINGS).run(examples(2), writer, batch_size=2))
    assert writer.counts() == {"kept": 0, "dropped": {"refused by the chat template": 2}}


# ---- bounds ----


def test_prompts_are_read_lazily(model: Any, tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[Example]:
        nonlocal read
        for example in examples(1000):
            read += 1
            yield example

    with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
        for _ in islice(collector(model).run(endless(), writer, batch_size=2), 5):
            assert read <= 3 * 2 * LOOKAHEAD


def test_stored_rows_are_not_kept_in_memory(model: Any, tmp_path: Path) -> None:
    def alive() -> int:
        return sum(type(thing) is TrajectoryRow for thing in gc.get_objects())

    before, held = alive(), []
    with TrajectoryWriter(tmp_path, SETTINGS.as_dict(), resume=True) as writer:
        for number, _ in enumerate(collector(model).run(examples(60), writer, batch_size=4)):
            if number % 5 == 4:
                held.append(alive() - before)
    assert len(held) == 3 and max(held) <= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "must be >= 1, got 0"),
        ({"max_new_seq_len": 3}, "at least the block size 4, got 3"),
        ({"prompt_template": "no place"}, "contains {question}"),
        ({"block_size": 256, "max_new_seq_len": 256}, "below the model's context of 256, got 256"),
    ],
)
def test_invalid_settings_are_refused(model: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        collector(model, replace(SETTINGS, **changes))
    assert message in str(error.value)


def test_a_cache_that_cannot_be_rolled_back() -> None:
    config = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=PAD_ID)
    with pytest.raises(UnsupportedModelError, match="cannot be rolled back"):
        collector(MambaForCausalLM(config))


# ---- the real thing: kills, processes, memory ----


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), seed=SEED)


KILLS = 10
WORKER = """
import os, random, signal, sys, time
from pathlib import Path
from cllm.cli import collect
import cllm.trajectory.collect, cllm.trajectory.store  # imported once, before all forks
from cllm.models import load_model, load_tokenizer

words, folder, rng = sys.argv[1:], Path(sys.argv[sys.argv.index("--output") + 1]), random.Random(0)
load_model(words[words.index("--model") + 1], device="cpu")

def start():
    child = os.fork()
    if not child:
        try:
            collect.main(words, task="gsm8k")
        finally:
            os._exit(0)
    return child

def shards():
    return len(list(folder.glob("part-*.parquet")))

killed = 0
while killed < KILLS:
    goal, child = shards() + rng.randint(0, 3), start()
    while shards() < goal and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed += os.WIFSIGNALED(status)
    print(killed, shards(), flush=True)
""".replace("KILLS", str(KILLS))


def words(model_dir: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(model_dir), "--filename", str(data), "--output", str(output), "--device", "cpu"]
    return [*given, "--max_new_tokens", "4", "--max_new_seq_len", "12", "--batch_size", "2", *more]


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_kill_at_ten_random_moments(model_dir: Path, tmp_path: Path) -> None:
    """Forks of one warm parent run all of `cllm collect` and are killed; a fresh process completes the run."""
    data = write_rows(tmp_path / "d.jsonl", question_rows(90))
    folder = tmp_path / "killed"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *words(model_dir, data, folder)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    before: dict[str, TrajectoryRow] = {}
    assert worker.stdout is not None
    for _ in worker.stdout:  # after every kill
        before = check_nothing_lost(folder, before)
    errors = worker.communicate()[1]
    assert worker.returncode == 0, errors
    assert 0 < len(before) < 90

    done = command("-m", "cllm", "collect", "--task", "gsm8k", *words(model_dir, data, folder))
    assert done.returncode == 0 and "90 responses stored" in done.stdout, done.stderr
    check_nothing_lost(folder, before)
    assert not list(folder.glob(".*")) and not list(folder.glob("*.corrupt"))

    whole = command("-m", "cllm", "collect", "--task", "gsm8k", *words(model_dir, data, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert rows_of(folder) == rows_of(tmp_path / "whole")


def check_nothing_lost(folder: Path, before: dict[str, TrajectoryRow]) -> dict[str, TrajectoryRow]:
    """All shards are readable, and every earlier row is still there, exactly once."""
    shards = list(folder.glob("part-*.parquet"))
    ids = [row_id for shard in shards for row_id in pq.read_table(shard)["row_id"].to_pylist()]
    assert len(ids) == len(set(ids))
    rows = rows_of(folder) if shards else {}
    assert all(rows.get(key) == row for key, row in before.items())
    return rows


@pytest.mark.slow
def test_two_real_processes(model_dir: Path, tmp_path: Path) -> None:
    """On the CPU, the processes that `accelerate launch` starts on several GPUs."""
    data = write_rows(tmp_path / "d.jsonl", [*question_rows(30), "no json", question_rows(1)[0]])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    both = command(*launch, "-m", "cllm", "collect", "--task", "gsm8k", *words(model_dir, data, tmp_path / "two"))
    assert both.returncode == 0, both.stderr
    assert "30 responses stored" in both.stdout and "1 left out: duplicate prompt" in both.stdout
    assert both.stdout.count("responses stored") == 1 and both.stderr.count("skipped line 31") == 1
    one = command("-m", "cllm", "collect", "--task", "gsm8k", *words(model_dir, data, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")


MEMORY = """
import resource, sys
from cllm.cli import collect
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few, many, words = sys.argv[1], sys.argv[2], sys.argv[3:]
collect.main([*words, "--filename", few, "--output", few + ".out"], task="gsm8k")
first = peak()
collect.main([*words, "--filename", many, "--output", many + ".out"], task="gsm8k")
print(first, peak(), file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(model_dir: Path, tmp_path: Path) -> None:
    few, many = (write_rows(tmp_path / f"{count}.jsonl", question_rows(count)) for count in (100, 1000))
    options = f"--model {model_dir} --device cpu --max_new_tokens 8 --max_new_seq_len 16 --batch_size 16 --use_aug"
    done = command("-c", MEMORY, str(few), str(many), *options.split())
    assert done.returncode == 0, done.stderr
    assert "1000 responses stored" in done.stdout or "left out" in done.stdout
    first, second = map(int, done.stderr.split("\n")[-2].split())
    assert second <= 1.1 * first, f"{first} KiB at 100 prompts, {second} KiB at 1,000"
