"""Who may use the demo's routes, tested without a browser."""

import httpx
import pytest
from commands import refused
from servers import run_server

from cllm.cli import demo, serve
from cllm.cli.command import add_options, parser, read
from cllm.serving.server.service import Limits

ASKED = {"prompt": "1 + 1?", "max_tokens": 8}


def test_with_a_key() -> None:
    with run_server(Limits(), question="1 + 1?", api_keys=["sesame"]) as running:
        page, race = httpx.get(running.url), running.url + "/demo/race"
        assert page.status_code == 200 and '"key": true' in page.text and "sesame" not in page.text
        assert httpx.post(race, json=ASKED).status_code == 401
        answer = httpx.post(race, json=ASKED, headers={"authorization": "Bearer sesame"}, timeout=60)
        assert answer.status_code == 200 and answer.text.count('"ended": true') == 2


def test_without_a_key_only_its_own_page_may_call_it() -> None:
    with run_server(Limits(), question="1 + 1?") as running:
        race, other = running.url + "/demo/race", {"host": "evil.example"}
        assert '"key": false' in httpx.get(running.url).text
        assert httpx.get(running.url, headers=other).status_code == 400
        assert httpx.post(race, json=ASKED, headers=other).status_code == 400
        assert httpx.post(race, json=ASKED, headers={"content-type": "text/plain"}).status_code == 415
        assert httpx.post(race, json=ASKED, timeout=60).status_code == 200


def test_where_the_key_comes_from(monkeypatch) -> None:
    for kind in (serve.ServeOptions, demo.DemoOptions):

        def keys(*words: str, kind=kind) -> list[str]:
            options = parser("", "cllm")
            add_options(options, kind)
            return read(kind, vars(options.parse_args(["m", *words]))).api_keys()

        monkeypatch.setenv(serve.KEY, "environment")
        assert keys() == ["environment"]
        assert keys("--api_key", "one", "--api_key", "two") == ["one", "two"]
        monkeypatch.delenv(serve.KEY)
        assert keys() == []


@pytest.mark.parametrize("command", [serve, demo])
@pytest.mark.parametrize("key", ["", " ", "secret ", "\tsecret", "secret\r"])
@pytest.mark.parametrize("given", ["option", "environment"])
def test_empty_key_does_not_open_the_server(tiny_model_dir, monkeypatch, capsys, command, key: str, given: str) -> None:
    """As with ``--api_key "$KEY"`` if the variable is unset, or if the key is only a file's newline."""
    monkeypatch.setenv(serve.KEY, key if given == "environment" else "right")
    words = ["--port", "0", *(["--api_key", key] if given == "option" else [])]
    message = refused(capsys, command.main, tiny_model_dir, *words)
    assert "the API key is empty or has blanks around it" in message and "secret" not in message
