"""Screenshots of the demo page in headless Chromium: narrow and wide, light and dark.

pip install playwright && apt-get install chromium
python scripts/demo_screenshots.py --model MODEL --output docs/images/demo
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from playwright.sync_api import Browser, sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]

QUESTION = "Pavel's book has 180 pages. He reads 19 pages every evening. How many pages are left after 7 evenings?"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", required=True)
    options.add_argument("--output", required=True, help="prefix of the files: OUTPUT-WIDTH-SCHEME.png")
    options.add_argument("--prompt", default=QUESTION)
    options.add_argument("--tokens", type=int, default=96)
    options.add_argument("--forward", type=int, default=5, help="the step of the trajectory to show")
    args = options.parse_args()
    command = [sys.executable, "-m", "cllm", "demo", args.model, "--port", "0", "--no-browser", "--prompt", args.prompt]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = server.stdout.readline().split()[2].rstrip(";")
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
            for width in (360, 1440):
                for scheme in ("light", "dark"):
                    screenshot(browser, url, args, width, scheme)
    finally:
        server.terminate()


def screenshot(browser: Browser, url: str, args: argparse.Namespace, width: int, scheme) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(url)
    page.fill("#most", str(args.tokens))
    page.click("#run")
    page.locator("#message").filter(has_text="Done").wait_for(timeout=600_000)
    for _ in range(args.forward - 1):
        page.click("#on")
    page.screenshot(path=f"{args.output}-{width}-{scheme}.png", full_page=True)
    page.close()


if __name__ == "__main__":
    main()
