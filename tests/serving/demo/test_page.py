"""The page in a real browser: headless Chromium, driven by Playwright. Skipped if there is none."""

import shutil
from collections.abc import Iterator

import pytest
from servers import run_server
from tiny import EOS_ID, tiny_model

from cllm.serving.server.service import Limits

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = tiny_model(initializer_range=0.1, seed=2)
    with run_server(Limits(new_tokens=64), model=model, eos=[EOS_ID], question="What is 1 </script> + 1?") as running:
        yield running.url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(params=[(360, "light"), (1440, "dark")], ids=["phone", "desk"])
def page(browser, url: str, request):
    """The page in two sizes and colour schemes; fails if the console shows an error at the end."""
    width, scheme = request.param
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(url)
    yield opened
    opened.close()
    assert not errors


def text(page, selector: str) -> str:
    return page.locator(selector).text_content()


def run_by_keyboard(page) -> None:
    """Ask the question and wait for the end of both columns, without a mouse."""
    page.focus("#prompt")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("40")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#message").filter(has_text="Done").wait_for(timeout=60_000)


def test_race(page) -> None:
    assert page.input_value("#prompt") == "What is 1 </script> + 1?"
    run_by_keyboard(page)
    assert text(page, "#message") == "Done: both texts are the same."
    assert text(page, "#ar .answer") == text(page, "#jacobi .answer") != ""
    for method in ("ar", "jacobi"):
        tokens, forwards = (int(text(page, f"#{method} .{name}")) for name in ("tokens", "forwards"))
        assert tokens <= 40 and float(text(page, f"#{method} .tpf")) == pytest.approx(tokens / forwards, abs=0.005)
        assert page.locator(f"#{method} .answer span").count() == forwards
    assert text(page, "#ar .tpf") == "1.00"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"


def test_trajectory_by_keyboard(page) -> None:
    run_by_keyboard(page)
    forwards, gained, fast = int(text(page, "#jacobi .forwards")), 0, 0
    page.focus("#place")
    for number in range(1, forwards + 1):
        words = text(page, "#what").split()
        assert words[:4] == ["Forward", str(number), "of", f"{forwards}:"]
        gained, fast = gained + int(words[4]), fast + int(words[6])
        assert page.locator("#state .fast").count() == int(words[6])
        page.keyboard.press("ArrowRight")
    tokens = int(text(page, "#jacobi .tokens"))
    assert gained == tokens and tokens - forwards <= fast <= tokens
    page.click("#back")
    assert text(page, "#what").startswith(f"Forward {forwards - 1} of")


def test_errors_are_shown(page) -> None:
    page.evaluate("document.getElementById('most').max = ''")
    page.fill("#most", "1000")
    page.route("**/demo/race", lambda route: route.fulfill(status=200, body='data: {"error": "busy"}\n\n'))
    page.click("#run")
    page.locator("#message").filter(has_text="Error: busy").wait_for()
    assert page.locator("#run").is_enabled()


def test_page_asks_for_the_api_key(browser) -> None:
    with run_server(Limits(new_tokens=8), eos=[EOS_ID], question="1 + 1?", api_keys=["sesame"]) as running:
        page = browser.new_page()
        page.goto(running.url)
        for key, message in (("wrong", "Error: a valid API key is needed"), ("sesame", "Done")):
            page.fill("#key", key)
            page.click("#run")
            page.locator("#message").filter(has_text=message).wait_for(timeout=60_000)
        page.close()
