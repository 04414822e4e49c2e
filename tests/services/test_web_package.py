"""The package `web` in Debian's Chromium: the bundle runs in the page, and its tokens are those of the runtime.

The browser reaches nothing but the packaged folder: every other request is refused and fails the test, as does anything
that the page writes to the console.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy.exporters.packages.package import package_bundle
from lrt_deploy.exporters.packages.web import npm_line
from lrt_deploy.tolerances import kernel_limits

from .test_page import CHROMIUM, FLAGS

PROMPT, SECOND = "def emit(self, record):\n", "\n\ndef close(self):\n"
LONG = 'class Handler:\n    """Dispatches logging events to specific destinations, by a réglage of its own."""\n' * 6
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def assets() -> Path:
    folder = Path(os.environ.get("LRT_DEPLOY_WEB_ASSETS") or HERE / "build" / "web-assets")
    assert folder.is_dir(), f"{folder} is missing: `make web-assets`, or `{npm_line(str(folder))}`"
    return folder


@pytest.fixture(scope="module")
def quantized(make_once, golden_of):
    """The demo in a precision whose weights are integers."""

    def make(folder: Path) -> None:
        lrt_deploy.export_bundle(golden_of("demo").folder, folder, precision="int8-weight-only", max_seq_len=256)

    return make_once("demo-int8-weight-only", make)


@pytest.fixture(scope="session")
def packaged(bundle, assets, tmp_path_factory):
    """The folder, and its list."""
    folder = tmp_path_factory.mktemp("web") / "package"
    return folder, package_bundle(bundle, folder, "web", assets=assets)


@pytest.fixture(scope="session")
def address(packaged):
    """The package as its README says that it is served, on a free port."""
    with served(*packaged) as found:
        yield found


@contextlib.contextmanager
def served(folder, package):
    assert (folder / "README.md").read_text().startswith(f"```console\n$ {package.run}\n")
    words = shlex.split(package.run)
    assert words[0] == "python3" and words[-1] == "8000"
    command = [sys.executable, "-u", *words[1:-1], "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        port = re.search(rb"port (\d+)", server.stdout.readline())[1].decode()
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "these tests drive Chromium: apt-get install chromium, or set LRT_DEPLOY_CHROMIUM to its path"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def loaded(browser, address):
    """One page for all tests."""
    with opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def opened(browser, address):
    """A page that is ready, reaches nothing but the package, and keeps what its worker says."""
    said, refused = [], []

    def guard(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            refused.append(route.request.url)
            route.abort()

    with browser.new_context(viewport={"width": 900, "height": 800}) as context:
        context.set_default_timeout(60_000)
        context.route(re.compile("^(?!data:|blob:)"), guard)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.add_init_script(
            "const Plain = Worker; window.said = [];"
            "window.Worker = class extends Plain { constructor(...given) { super(...given);"
            " this.addEventListener('message', ({ data }) => { window.said.push(data);"
            " if (data.type === 'answer' && --window.stopAfter === 0) document.getElementById('stop').click();"
            " if (['end', 'error'].includes(data.type)) window.finish?.(); }); } };"
        )
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]")
        page.click("summary")
        yield page
    assert said == [] and refused == []


@pytest.fixture
def page(loaded):
    """A new conversation: greedy, 64 tokens, prompts read stepwise."""
    loaded.click("#new")
    set_options(loaded, policy="stepwise", tolerance=1e-3, count=64, temperature=0)
    return loaded


def set_options(page, **options):
    for name, value in options.items():
        field = page.locator(f"#{name}")
        field.select_option(value) if name == "policy" else field.fill(str(value))


def send(page, text, until_end=True):
    """Generate; returns the messages about the prompt and about the end."""
    page.evaluate("() => { window.said = []; window.done = new Promise((resolve) => { window.finish = resolve; }); }")
    page.fill("#text", text)
    page.press("#text", "Enter")
    return end_of(page) if until_end else None


def end_of(page):
    page.evaluate("() => window.done")
    found = {message["type"]: message for message in page.evaluate("() => window.said")}
    assert "error" not in found, found["error"]
    return found["prompt"], found["end"]


def generated(decoder, tokens, count=64):
    return [event.token for event in decoder.generate(tokens, max_new_tokens=count, policy="stepwise")]


def test_64_greedy_tokens_are_those_of_the_runtime_and_a_second_turn_continues_the_state(page, decoder, bundle):
    prompt, end = send(page, PROMPT)
    first = decoder.tokenizer.encode_prompt(PROMPT)
    assert prompt["tokens"] == first and prompt["policy"] == "stepwise" and prompt["passes"] == 1
    command = [Path(sys.executable).with_name("lrt-deploy"), "generate", bundle, "--prompt", PROMPT, "--json"]
    run = subprocess.run([*command, "--max-new-tokens", "64"], capture_output=True, text=True, check=True)
    assert f'"tokens": {end["tokens"]}'.replace(" ", "") in run.stdout.replace(" ", "").replace("\n", "")
    assert end["text"] == page.locator(".answer").last.text_content() == decoder.tokenizer.decode(end["tokens"])

    prompt, after = send(page, SECOND)
    second = decoder.tokenizer.encode(SECOND)
    assert prompt["tokens"] == [end["tokens"][-1], *second], "only what is new is read"
    assert prompt["held"] == len(first) + 64 + len(second)
    assert after["tokens"] == generated(decoder, first + end["tokens"] + second)


def test_a_prompt_that_is_read_in_passes_has_the_same_tokens_after_it_and_shows_its_residual(page, decoder):
    set_options(page, policy="fixed-point", tolerance=1e-3)
    prompt, end = send(page, LONG)
    assert len(prompt["tokens"]) > 128, "more than one chunk"
    assert 2 < prompt["passes"] < 16 and 0 < prompt["residual"] <= 1e-3 and prompt["fallback"] is None
    assert f"{prompt['passes']:.1f} passes, residual " in page.locator("main .facts").first.text_content()
    assert end["tokens"] == generated(decoder, decoder.tokenizer.encode_prompt(LONG))


def test_an_iteration_that_cannot_reach_its_tolerance_is_finished_stepwise_and_says_so(page, decoder):
    set_options(page, policy="fixed-point", tolerance=1e-9, count=16)
    prompt, end = send(page, LONG)
    assert prompt["fallback"].startswith("the iteration did not converge at token ")
    assert "the rest was read stepwise" in page.locator("main .facts").first.text_content()
    assert end["tokens"] == generated(decoder, decoder.tokenizer.encode_prompt(LONG), 16)


def test_a_quantized_precision_chooses_the_tokens_of_the_runtime(browser, assets, quantized, tmp_path):
    """WebAssembly has other kernels for integers: few tokens may differ, and only where the logits are about equal."""
    package = package_bundle(quantized, tmp_path / "package", "web", assets=assets)
    assert package.precision == "int8-weight-only"
    with served(tmp_path / "package", package) as address, opened(browser, address) as page:
        set_options(page, policy="stepwise", tolerance=1e-3, count=64, temperature=0)
        prompt, end = send(page, PROMPT)
    assert len(end["tokens"]) == 64
    with lrt_deploy.open_decoder(quantized, threads=1) as decoder:
        state, behind = decoder.prefill([prompt["tokens"]], policy="stepwise"), []
        for token in end["tokens"]:
            (logits,) = state.logits
            behind.append(float(logits.max() - logits[token]))
            decoder.step(state, [token])
    assert max(behind) <= kernel_limits("int8-weight-only").logit and behind.count(0) >= 0.93 * 64


def test_text_becomes_the_tokens_of_the_runtime(page, decoder):
    """Also where it has names of special tokens, other scripts, and blanks of all kinds."""
    set_options(page, count=1)
    texts = [
        "<|bos|> and <|user_end|>",
        "DON'T stop, it'S 12345 x\u00a0y\u2028\n\n  \t z ",
        "漢字かな 😀 e\u0301 ǅ ſ’s ²³ \u200b",
    ]
    for text in texts:
        page.click("#new")
        prompt, _ = send(page, text)
        assert prompt["tokens"] == decoder.tokenizer.encode_prompt(text)


def test_an_answer_can_be_stopped_and_goes_on_where_it_was(page, decoder):
    set_options(page, count=100_000)
    page.evaluate("() => { window.stopAfter = 5; }")
    _, end = send(page, PROMPT)
    assert end["reason"] == "stopped" and len(end["tokens"]) >= 5
    set_options(page, count=5)
    _, after = send(page, "\n")
    tokens = [*decoder.tokenizer.encode_prompt(PROMPT), *end["tokens"], *decoder.tokenizer.encode("\n")]
    assert after["tokens"] == generated(decoder, tokens, 5)


def test_beyond_the_capacity_is_an_error_and_changes_nothing(page, decoder):
    set_options(page, count=5)
    first, end = send(page, PROMPT)
    send(page, "x y " * 5000, until_end=False)
    page.wait_for_selector("#notice:has-text('Error: ')")
    assert "more than the capacity of 640" in page.text_content("#notice")
    _, after = send(page, SECOND)
    tokens = [*first["tokens"], *end["tokens"], *decoder.tokenizer.encode(SECOND)]
    assert after["tokens"] == generated(decoder, tokens, 5)


def test_neither_the_page_nor_its_worker_can_reach_another_origin(browser, address):
    """Refused by the policy of the page, with no help from the test."""
    seen = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *arguments): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other, browser.new_context() as context:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        fetch = f"() => fetch('http://127.0.0.1:{other.server_port}/').then(() => 'reached', () => 'refused')"
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]", timeout=60_000)
        (worker,) = page.workers
        assert page.evaluate(fetch) == "refused" and worker.evaluate(fetch) == "refused"
        other.shutdown()
    assert seen == []


def test_a_file_that_was_altered_is_named(browser, packaged, address):
    folder, _ = packaged
    path = folder / "bundle" / "tokenizer" / "tokenizer.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"1", b"2", 1))
    try:
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("#notice:has-text('Error: ')", timeout=60_000)
            assert "tokenizer/tokenizer.json is not the file that was packaged" in page.text_content("#notice")
    finally:
        path.write_bytes(before)
