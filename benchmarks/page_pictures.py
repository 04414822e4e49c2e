"""Take the pictures of the chat page for docs/serving.md: both widths, light and dark, of one conversation.

Starts a server of a bundle, drives Chromium by playwright, and writes `chat-page-WIDTH-SCHEME.png` into a folder. The
conversation has a seed and is read stepwise, so the same bundle gives the same texts; the speed on the page is the
machine's. `make pictures` does it for the demo.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from server_process import serving

WIDTHS, HEIGHT, SCHEMES = (1280, 400), 800, ("light", "dark")
PROMPTS = ('def read(self, size=-1):\n    """Read', '\n\n\ndef write(self, data):\n    """Write')
OPTIONS = {"temperature": 0.6, "seed": 5, "max_tokens": 64}
SHOWN_TOKEN = 22  # of the first answer, in its strip
FLAGS = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # Chromium's sandbox refuses root


def take(browser: Browser, url: str, width: int, scheme: str, target: Path) -> None:
    """Hold the conversation in a new browser, its first answer given twice, and save the picture of its beginning."""
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("body.connected")
    page.click("#open-options")
    for name, value in OPTIONS.items():
        page.locator(f"#settings [name={name}]").fill(str(value))
    page.locator("#settings [name=prefill]").select_option("stepwise")
    page.click("#options .close")
    for at, prompt in enumerate(PROMPTS):
        page.fill("#message", prompt)
        page.press("#message", "Enter")
        page.wait_for_selector("body:not(.writing)")
        if at == 0:
            page.click(".retry")
            page.wait_for_selector("body:not(.writing)")
    strip = page.locator("canvas").first
    strip.press("Home")
    for _ in range(SHOWN_TOKEN - 1):
        strip.press("ArrowRight")
    page.evaluate("document.scrollingElement.scrollTo(0, 0)")
    page.screenshot(path=str(target))
    context.close()


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Take the pictures of the chat page.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("Chromium was not found; name it by --chromium")
    with serving(options.bundle, "--served-model-name", "demo") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for width in WIDTHS:
            for scheme in SCHEMES:
                take(browser, server.url, width, scheme, options.folder / f"chat-page-{width}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
