"""``cllm serve`` and ``cllm demo`` as commands."""

import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from commands import refused

from cllm.cli import demo, serve


@pytest.fixture
def server(tiny_model_dir, tmp_path):
    """The command in a process of its own; its address and the process."""
    command = [sys.executable, "-m", "cllm", "serve", str(tiny_model_dir), "--port", "0", "--grace", "20"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen([*command, "--served_model_name", "tiny"], stdout=subprocess.PIPE, stderr=log, text=True)
        line = process.stdout.readline()
        match = re.fullmatch(r"tiny on (http://127\.0\.0\.1:\d+)/v1; Ctrl-C stops it\n", line)
        assert match, line + (tmp_path / "log").read_text()
        yield match[1], process
        process.kill()
        process.wait()
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_sigterm_lets_answers_end(server) -> None:
    url, process = server
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 200, "temperature": 0, "stop": "\n\n\n"}
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(url + "/v1/completions", json=body, timeout=100)))
    asking.start()
    while "cllm_rows_running 1.0" not in httpx.get(url + "/metrics").text and not answers:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] > 0
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
        (["--host", "999.1.1.1", "--port", "0"], "cannot listen on 999.1.1.1 port 0"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--batch_size", "0"], "must be an integer >= 1"),
        (["--timeout", "nan"], "must be a number of seconds >= 0, got 'nan'"),
        (["--grace=-1"], "must be a number of seconds >= 0, got '-1'"),
        (["--port", "0", "--block_size", "9999"], "block_size must be between 1 and the context length"),
    ],
)
def test_refusals(tiny_model_dir, capsys, words, message) -> None:
    assert message in refused(capsys, serve.main, tiny_model_dir, *words)


def test_a_port_that_is_taken(tiny_model_dir, capsys) -> None:
    from cllm.serving.server.run import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused(capsys, serve.main, tiny_model_dir, "--port", port)


@pytest.mark.parametrize("command", [serve, demo])
def test_packages_that_are_missing(tiny_model_dir, monkeypatch, capsys, command) -> None:
    monkeypatch.setitem(sys.modules, "cllm.serving.server.app", None)  # as where fastapi cannot be imported
    assert "pip install -e .[serve]" in refused(capsys, command.main, tiny_model_dir)


def test_record(tiny_model_dir, tmp_path, capsys) -> None:
    picture = tmp_path / "race.svg"
    demo.main([str(tiny_model_dir), "--record", str(picture), "--record_tokens", "20", "--prompt", "1 + 1?"])
    assert picture.read_text().startswith("<svg ")
    assert ".svg" in refused(capsys, demo.main, tiny_model_dir, "--record", tmp_path / "race.gif")
    assert "leaves no room" in refused(capsys, demo.main, tiny_model_dir, "--record", picture, "--prompt", "x" * 400)
