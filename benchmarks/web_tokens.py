"""Milliseconds per token of the packaged page in Chromium beside ONNX Runtime in Python on one thread, by turns.

    python benchmarks/web_tokens.py demo/bundle --assets build/web-assets

Both read the same prompt and give the same greedy tokens, which is checked. Each round times the page, then the
library; the medians and their ratio are printed as JSON, with the bytes that a first visit loads. The page's time
includes its messages; the library's is that of `generate`.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lrt_deploy
from lrt_deploy.exporters.packages.package import package_bundle

PROMPT = "def emit(self, record):\n"
KEEP = (
    "const Plain = Worker; window.Worker = class extends Plain { constructor(...given) { super(...given);"
    " this.addEventListener('message', ({ data }) => {"
    " if (['end', 'error'].includes(data.type)) window.finish?.(data); }); } };"
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a log."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def time_page(page: Any, count: int) -> dict[str, Any]:  # noqa: ANN401
    """Generate in the page; return what its worker says at the end."""
    page.click("#new")
    page.fill("#count", str(count))
    page.fill("#temperature", "0")
    page.locator("#policy").select_option("stepwise")
    page.evaluate("() => { window.done = new Promise((resolve) => { window.finish = resolve; }); }")
    page.fill("#text", PROMPT)
    page.press("#text", "Enter")
    found: dict[str, Any] = page.evaluate("() => window.done")
    return found


def time_library(decoder: lrt_deploy.Decoder, count: int) -> tuple[list[int], float]:
    """Generate in this process; return the tokens and the milliseconds per token after the first."""
    assert decoder.tokenizer is not None
    events = decoder.generate(decoder.tokenizer.encode_prompt(PROMPT), max_new_tokens=count, policy="stepwise")
    tokens, begun = [next(events).token], time.perf_counter()
    tokens += [event.token for event in events]
    return tokens, 1000 * (time.perf_counter() - begun) / max(1, len(tokens) - 1)


def main() -> None:
    """Run the rounds and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        package = package_bundle(options.bundle, Path(folder, "page"), "web", assets=options.assets)
        handler = functools.partial(Quiet, directory=f"{folder}/page")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.add_init_script(KEEP)
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.wait_for_selector("body[data-state=ready]", timeout=120_000)
            page.click("summary")
            times: dict[str, list[float]] = {"page": [], "library": []}
            with lrt_deploy.open_decoder(options.bundle, precision=package.precision, threads=1) as decoder:
                for _ in range(options.rounds + 1):
                    ended, (tokens, library) = time_page(page, options.tokens), time_library(decoder, options.tokens)
                    assert ended["tokens"] == tokens, "the page chose other tokens"
                    times["page"].append(ended["msPerToken"])
                    times["library"].append(library)
            browser.close()
            server.shutdown()
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up
    ratio = statistics.median(a / b for a, b in zip(times["page"][1:], times["library"][1:], strict=True))
    loaded = sum(record.bytes for name, record in package.files.items() if not name.endswith((".md", "LICENSE")))
    report = {"ms_per_token": medians, "best_ms_per_token": {name: min(found) for name, found in times.items()}}
    report |= {"ratio": ratio, "loaded_bytes": loaded, "precision": package.precision, "rounds": options.rounds}
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
