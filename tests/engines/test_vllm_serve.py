"""``cllm serve --engine vllm``: the line that it types, and the server that it becomes."""

import json
import os
import random
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from tiny import save_tiny_adapter, save_tiny_checkpoint

from cllm.cli import serve
from cllm.models import add_to_record, store_choice

SECONDS = float(os.environ.get("CLLM_VLLM_SECONDS", 20))  # of the crowd of clients
CLIENTS = 16


class Started(Exception):
    """In the place of becoming another program."""


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The line that ``cllm serve --engine vllm`` types, given more words."""

    def typed(*words: Any) -> list[str]:
        def become(program: str, argv: list[str], environment: dict[str, str]) -> None:
            assert program == sys.executable and environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
            raise Started

        monkeypatch.setattr(os, "execve", become)
        monkeypatch.setattr("cllm.engines.install.find_spec", lambda name: name)
        with pytest.raises(Started):
            serve.main(["--engine", "vllm", *map(str, words)])
        return shlex.split(capsys.readouterr().out)

    return typed


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    folder = save_tiny_checkpoint(tmp_path / "m")
    add_to_record(folder, {"block_size": 8})
    return folder


def after(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_width_is_the_checkpoints_or_what_tune_stored(line, model) -> None:
    words = line(model, "--port", 1234)
    assert words[:3] == ["vllm", "serve", str(model)] and after(words, "--port") == "1234"
    speculative = {"method": "custom_class", "model": "cllm.engines.vllm.JacobiProposer", "num_speculative_tokens": 7}
    assert json.loads(after(words, "--speculative-config")) == speculative and "--additional-config" not in words
    store_choice(str(model), 12, "context")
    assert json.loads(after(line(model), "--speculative-config"))["num_speculative_tokens"] == 11
    assert json.loads(after(line(model, "--block_size", 4), "--speculative-config"))["num_speculative_tokens"] == 3


def test_a_width_of_one_is_ar(line, model) -> None:
    store_choice(str(model), 1, "context")
    assert "--speculative-config" not in line(model)


def test_options_go_on(line, model) -> None:
    words = line(model, "--guess", "prompt_lookup", "--temperature", "0.5", "--", "--max-model-len", "200")
    assert json.loads(after(words, "--additional-config")) == {"cllm": {"guess": "prompt_lookup"}}
    assert json.loads(after(words, "--override-generation-config"))["temperature"] == 0.5
    assert after(words, "--max-model-len") == "200"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_slots", "99"], "--max_slots is an option of our own server"),
        (["--min_p", "0.1"], "vLLM takes no min_p (--min_p) beside drafts, got 0.1"),
        (["--guess", "pool"], "choose another"),
        (["--guess", "auto"], "unknown guess 'auto'"),
        (["--block_size", "200"], "widths (--block_size) of 1 to 129, got 200"),
    ],
)
def test_refusals(model, capsys, words, message) -> None:
    assert message in refused(capsys, serve.main, model, "--engine", "vllm", *words)


def test_refusals_of_models(model, tmp_path, capsys, monkeypatch) -> None:
    adapter = save_tiny_adapter(tmp_path / "a", model)
    assert "has a lossless adapter" in refused(capsys, serve.main, adapter, "--engine", "vllm")
    monkeypatch.setattr("cllm.engines.install.find_spec", lambda name: None)
    assert "pip install -e .[vllm]" in refused(capsys, serve.main, model, "--engine", "vllm")
    assert "need --engine vllm" in refused(capsys, serve.main, model, "--", "--max-model-len", "99")


# ------------------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def client(server: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def ask(client: Any, **more: Any) -> Any:
    return client.completions.create(**{"model": "random", "prompt": "1 + 1?", "max_tokens": 40} | more)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_clients_ask(server: str, client: Any) -> None:
    whole = ask(client).choices[0].text
    assert whole and whole == ask(client).choices[0].text  # greedy where nothing is said
    assert "".join(part.choices[0].text for part in ask(client, stream=True)) == whole
    stop = whole[5]
    assert ask(client, stop=[stop]).choices[0].text == whole[: whole.index(stop)]
    drawn = [choice.text for choice in ask(client, n=2, temperature=1, seed=7).choices]
    assert drawn[0] != drawn[1] and drawn == [choice.text for choice in ask(client, n=2, temperature=1, seed=7).choices]
    messages = [{"role": "user", "content": "1 + 1?"}]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = client.chat.completions.create(model="random", messages=messages, max_tokens=400, response_format=form)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)
    body = json.dumps({"model": "random", "prompt": "1 + 1?", "max_tokens": 40})
    curl = ["curl", "-s", f"{server}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    assert json.loads(subprocess.run(curl, capture_output=True, text=True, check=True).stdout)["choices"][0]["text"] == whole


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crowd_that_hangs_up(client: Any) -> None:
    alone = {prompt: ask(client, prompt=prompt, max_tokens=60).choices[0].text for prompt in (f"{n} + {n}?" for n in range(8))}
    end, failures, answers = time.monotonic() + SECONDS, list[Any](), list[bool]()

    def visit(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            prompt = rng.choice(list(alone))
            try:
                stream = ask(client, prompt=prompt, max_tokens=60, stream=True)
                parts, leaves = [], rng.randrange(4) if rng.random() < 0.3 else None
                for part in stream:
                    parts.append(part.choices[0].text)
                    if leaves is not None and len(parts) > leaves:
                        stream.close()
                        break
                else:
                    answers.append("".join(parts) == alone[prompt])
            except Exception as error:
                failures.append(error)

    crowd = [threading.Thread(target=visit, args=[number]) for number in range(CLIENTS)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert not failures and answers and all(answers)
    assert ask(client, prompt="0 + 0?", max_tokens=60).choices[0].text == alone["0 + 0?"]
