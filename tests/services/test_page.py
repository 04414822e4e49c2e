"""The chat page in Debian's Chromium, driven as a person would, against servers as processes.

Anything that the browser writes to its console fails the test: errors of scripts, refusals by the content security
policy, requests without an answer.
"""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = os.environ.get("LRT_DEPLOY_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing of it needs a network, and nothing of it looks for one.
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
FLAGS += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
PROMPT = "def emit(self, record):\n"
MARKUP = "<img src=x onerror=document.title='broken'><b>bold</b> &amp; <script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    missing = "the tests of the chat page drive Chromium, and none was found: apt-get install chromium, or set "
    assert CHROMIUM, f"{missing}LRT_DEPLOY_CHROMIUM to the path of one"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """(server, width, expected, settings of a context) -> the page, connected, as a first visitor finds it.

    `expected` is a part of the messages in the console that are meant to be there.
    """
    contexts, said = [], []

    def open_page(server, width=1280, expected="nothing", **settings):
        context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", **settings)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: None if expected in message.text else said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("body.connected")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def chat_server(launch, export_once):
    """A server of a random model that happens to expect the end of an answer."""
    return launch(where=export_once("gate32"))


def choose(page, **options):
    """Set options, by the fields of the panel."""
    page.click("#open-options")
    for name, value in options.items():
        field = page.locator(f"#settings [name={name}]")
        if isinstance(value, bool):
            field.set_checked(value)
        elif name == "prefill":
            field.select_option(value)
        else:
            field.fill(str(value))
    page.click("#options .close")


def written(page):
    """Wait until no answer is being written."""
    page.wait_for_selector("body:not(.writing)")


def send(page, text):
    page.fill("#message", text)
    page.press("#message", "Enter")
    written(page)


def texts(page):
    return [turn.text_content() for turn in page.locator("#turns > li .text").all()]


def facts(page, turn=-1):
    """What the page says of an answer."""
    found = page.locator("#turns > li").all()[turn].locator(".facts div").all()
    return {fact.locator("dt").text_content(): fact.locator("dd").text_content() for fact in found}


# Answers


def test_a_completion_is_streamed_and_shows_how_its_prompt_was_read(server, visit):
    page = visit(server)
    choose(page, temperature=0, max_tokens=20, prefill="stepwise")
    send(page, PROMPT)
    expected = server.complete(PROMPT, max_tokens=20, temperature=0, prefill="stepwise")
    assert texts(page) == [PROMPT, expected["choices"][0]["text"]]
    usage = expected["usage"]
    found = facts(page)
    assert found["Prompt"].startswith(f"{usage['prompt_tokens']} tokens")
    assert found["Answer"] == "20 tokens, at the limit"
    assert "stepwise" in found["Read"] or found["Read"] == "from memory"
    assert found["Speed"].endswith("tokens/s")
    assert page.text_content("#context") == f"{usage['total_tokens']} of 640 tokens"


def test_the_strip_has_the_cosine_of_each_token(server, visit):
    page = visit(server)
    choose(page, temperature=0, max_tokens=12)
    send(page, PROMPT)
    fields = {"max_tokens": 12, "temperature": 0, "lrt": {"latent_cosine": True}}
    cosines = server.complete(PROMPT, **fields)["choices"][0]["lrt"]["latent_cosine"]
    strip = page.locator("canvas")
    assert strip.get_attribute("aria-valuemax") == "12"
    for key, token in (("Home", 0), ("ArrowRight", 1), ("End", 11), ("ArrowLeft", 10)):
        strip.press(key)
        words = page.text_content(".latents output")
        assert words.startswith(f"token {token + 1} ")
        assert float(words.split()[2]) == pytest.approx(cosines[token], abs=0.02)
        assert strip.get_attribute("aria-valuetext") == words
    # It is a picture, and not an empty one.
    colors = page.evaluate(
        "() => { const c = document.querySelector('canvas');"
        " return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size }"
    )
    assert colors > 4
    choose(page, latent_cosine=False)
    page.click(".retry")
    written(page)
    assert not page.is_visible("canvas")


def test_an_empty_field_goes_on_with_the_text_as_it_is(server, visit):
    page = visit(server)
    choose(page, temperature=0, max_tokens=5, stop="END")
    send(page, PROMPT)
    page.click("#send")
    written(page)
    first, second = texts(page)[1:]
    assert server.complete(PROMPT + first, max_tokens=5, temperature=0)["choices"][0]["text"] == second


def test_a_chat_sends_the_whole_conversation_and_the_system_message(chat_server, visit):
    page = visit(chat_server)
    choose(page, temperature=0, max_tokens=6, system="Be brief.")
    send(page, "Hi")
    send(page, "And?")
    assert "reused" in facts(page)["Prompt"]  # the state of the first turn
    messages = [{"role": "system", "content": "Be brief."}]
    for text, role in zip(texts(page), ("user", "assistant", "user", "assistant"), strict=True):
        messages.append({"role": role, "content": text})
    last = messages.pop()["content"]
    assert chat_server.chat(messages, max_tokens=6, temperature=0)["choices"][0]["message"]["content"] == last


def test_models_begin_in_the_form_that_they_know_and_a_choice_is_remembered(server, chat_server, visit):
    page = visit(server)
    assert page.is_checked("[value=completion]")
    page.check("[value=chat]", force=True)
    page.reload()
    page.wait_for_selector("body.connected")
    assert page.is_checked("[value=chat]")
    assert visit(chat_server).is_checked("[value=chat]")


def test_options_go_into_the_request_and_each_retry_has_a_seed_of_its_own(server, visit):
    page = visit(server)
    choose(page, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.1)
    choose(page, frequency_penalty=0.1, presence_penalty=0.1, seed=7, max_tokens=30, stop="END\n\\n\\n")
    fields = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    fields |= {"frequency_penalty": 0.1, "presence_penalty": 0.1, "max_tokens": 30, "stop": ["END", "\n\n"]}
    send(page, PROMPT)
    assert texts(page)[1] == server.complete(PROMPT, seed=7, **fields)["choices"][0]["text"]
    page.click(".retry")
    written(page)
    assert texts(page)[1] == server.complete(PROMPT, seed=8, **fields)["choices"][0]["text"]
    page.click("#open-options")
    page.click("#defaults")
    assert {page.input_value(f"[name={name}]") for name in ("temperature", "seed", "stop")} == {""}


def test_stop_keeps_what_was_written_and_frees_the_slot(server, visit):
    page = visit(server)
    choose(page, max_tokens=600, temperature=0)
    before = server.gauge('lrt_requests_total{outcome="cancelled"}')
    page.evaluate("""() => new MutationObserver((_, observer) => {
        if (!document.querySelector('.assistant .text')?.textContent) return;
        observer.disconnect();
        document.querySelector('#send').click();
    }).observe(document.querySelector('#turns'), { subtree: true, childList: true, characterData: true })""")
    send(page, PROMPT)
    assert texts(page)[1]
    assert facts(page)["Answer"].endswith(", stopped")
    assert int(page.get_attribute("canvas", "aria-valuemax")) < 600
    server.wait_for("lrt_running", 0)
    assert server.gauge('lrt_requests_total{outcome="cancelled"}') == before + 1
    assert page.evaluate("document.activeElement.id") == "message"


def test_an_error_is_shown_as_the_server_says_it_and_can_be_retried(server, visit):
    page = visit(server, expected="status of 400")
    choose(page, max_tokens=5, top_p=0.5, temperature=0)
    page.locator("[name=max_tokens]").evaluate("field => { field.value = 5000 }")
    send(page, PROMPT)
    assert "this model's capacity is 640 tokens" in page.text_content(".error")
    page.locator("[name=max_tokens]").evaluate("field => { field.value = 5 }")
    page.click(".retry")
    written(page)
    assert not page.is_visible(".error")
    assert len(texts(page)) == 2
    assert not page.is_visible(".versions")


def test_the_page_asks_for_the_key_that_the_server_wants(launch, export_once, browser):
    server = launch(where=export_once("gate32"), environment={"LRT_DEPLOY_API_KEY": "secret"})
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#options[open]")
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("body.connected")
    page.keyboard.press("Escape")
    page.fill("#message", "Hi")
    page.press("#message", "Enter")
    page.wait_for_selector(".facts dd")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.close()


# The tree


def test_retries_and_edits_fork_and_every_version_can_be_reached(server, visit):
    page = visit(server)
    choose(page, max_tokens=5)
    send(page, PROMPT)
    page.click(".retry")
    written(page)
    send(page, "\nimport os")
    first_branch = texts(page)
    assert page.text_content(".assistant .count") == "2/2"
    assert len(first_branch) == 4

    page.hover("#turns > li >> nth=0")
    page.click(".edit-turn >> nth=0")
    assert page.input_value(".edit textarea >> nth=0") == PROMPT
    page.fill(".edit textarea >> nth=0", "class Other:")
    page.press(".edit textarea >> nth=0", "Enter")
    written(page)
    other = texts(page)
    assert other[0] == "class Other:"
    assert len(other) == 2
    assert page.text_content(".user .count") == "2/2"

    page.click(".user .previous >> nth=0")
    assert texts(page) == first_branch
    page.click(".assistant .previous >> nth=0")
    assert page.text_content(".assistant .count") == "1/2"
    assert len(texts(page)) == 2
    page.click(".assistant .next >> nth=0")
    assert texts(page) == first_branch
    page.click(".user .next >> nth=0")
    assert texts(page) == other
    assert page.is_disabled(".user .next >> nth=0")


def test_a_reload_keeps_the_tree_the_shown_branch_and_the_options(server, visit):
    page = visit(server)
    choose(page, max_tokens=5, temperature=0.5, stop="\n\n")
    send(page, PROMPT)
    page.click(".retry")
    written(page)
    page.click(".assistant .previous")
    before = texts(page), facts(page), page.text_content(".latents output")
    page.reload()
    page.wait_for_selector("body.connected")
    assert (texts(page), facts(page), page.text_content(".latents output")) == before
    assert page.text_content(".assistant .count") == "1/2"
    assert page.input_value("[name=temperature]") == "0.5"
    page.click(".assistant .next")
    assert page.text_content(".assistant .count") == "2/2"


def test_a_reload_in_the_middle_of_an_answer_keeps_what_had_come(server, visit):
    page = visit(server)
    choose(page, max_tokens=600, temperature=0)
    page.evaluate("""() => new MutationObserver((_, observer) => {
        if (!document.querySelector('.assistant .text')?.textContent) return;
        observer.disconnect();
        location.reload();
    }).observe(document.querySelector('#turns'), { subtree: true, childList: true, characterData: true })""")
    page.fill("#message", PROMPT)
    with page.expect_navigation():
        page.press("#message", "Enter")
    page.wait_for_selector("body.connected")
    assert texts(page)[0] == PROMPT
    assert texts(page)[1]
    assert page.text_content("#send") != "Stop"
    server.wait_for("lrt_running", 0)


def test_conversations_are_listed_and_deleted(server, visit):
    page = visit(server)
    choose(page, max_tokens=3)
    for text in ("first one", "second one"):
        page.click("#new")
        send(page, text)
    page.click("#open-history")
    assert [title.text_content() for title in page.locator("#conversations .title").all()] == [
        "second one",
        "first one",
    ]
    page.click("#conversations .open >> nth=1")
    assert texts(page)[0] == "first one"
    page.click("#open-history")
    page.click("#conversations .delete >> nth=1")
    page.click("#conversations .delete >> nth=1")
    page.click("#history .close")
    page.reload()
    page.wait_for_selector("body.connected")
    page.click("#open-history")
    assert page.locator("#conversations li").count() == 1


# Safety and reach


def test_text_that_looks_like_html_stays_text(server, visit):
    page = visit(server)
    choose(page, max_tokens=3)
    send(page, MARKUP)
    assert texts(page)[0] == MARKUP
    page.reload()
    page.wait_for_selector("body.connected")
    assert texts(page)[0] == MARKUP
    page.click("#open-history")
    assert page.text_content("#conversations .title") == MARKUP
    assert page.locator("main :is(img, b, script)").count() == 0
    assert "broken" not in page.title()


def test_the_policy_refuses_inline_code_and_html_from_scripts(server, browser):
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("body.connected")
    page.evaluate("""() => {
        const script = document.createElement('script');
        try { script.text = 'document.title = "broken"'; document.body.append(script) } catch {}
        const image = document.createElement('img');
        try { image.setAttribute('onerror', 'document.title = "broken"') } catch {}
        try { document.body.innerHTML = '<p>broken</p>' } catch {}
    }""")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert "broken" not in page.title()
    assert "broken" not in page.inner_text("body")
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_everything_can_be_done_by_keyboard(server, visit):
    page = visit(server)
    press = page.keyboard.press

    def tab_to(selector, most=40):
        for _ in range(most):
            press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} was not reached")

    assert page.evaluate("document.activeElement.id") == "message"
    tab_to("#open-options")
    press("Enter")
    tab_to("[name=max_tokens]")
    page.keyboard.type("4")
    press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-options"
    tab_to("#message")
    page.keyboard.type("import os")
    press("Shift+Enter")
    page.keyboard.type("import re")
    press("Enter")
    written(page)
    assert texts(page)[0] == "import os\nimport re"
    tab_to(".retry")
    press("Enter")
    written(page)
    assert page.evaluate("document.activeElement.id") == "message"
    tab_to(".previous")
    press("Enter")
    assert page.text_content(".assistant .count") == "1/2"
    assert page.evaluate("document.activeElement.matches('.next')")
    press("Enter")
    assert page.text_content(".assistant .count") == "2/2"
    tab_to(".edit-turn")
    press("Enter")
    press("Escape")
    assert page.evaluate("document.activeElement.matches('.edit-turn')")
    press("Enter")
    page.keyboard.type(" # edited")
    press("Enter")
    written(page)
    assert texts(page)[0].endswith(" # edited")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overflows_and_text_has_contrast(server, visit, width, scheme):
    page = visit(server, width, color_scheme=scheme)
    choose(page, max_tokens=150, temperature=1)
    send(page, "a_very_long_name_" * 20 + "\n\tindented\n" + "word " * 60)
    page.click(".retry")
    written(page)
    for opener, panel in ((None, "body"), ("#open-options", "#options"), ("#open-history", "#history")):
        if opener:
            page.click(opener)
        # Boxes that are cut on purpose, like hidden labels and long titles, hide their overflow.
        outside = page.evaluate(
            """(panel) => [...document.querySelectorAll(panel + ' *')]
            .filter(e => e.checkVisibility() && !e.closest('.hidden, .skip') && e.getClientRects().length)
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
            .map(e => e.outerHTML.slice(0, 80))""",
            panel,
        )
        assert outside == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        if opener:
            page.click(f"{panel} .close")
    for name in (".text", ".facts dt", ".facts dd", "#context", ".retry", "#open-options"):
        assert contrast(page, name) >= 4.5, name


def contrast(page, selector):
    """The ratio of contrast (WCAG 2) of a text on the paper."""
    colors = page.locator(selector).first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    )
    light, dark = sorted((luminance(color) for color in colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    parts = [float(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_control_has_a_name(server, visit):
    page = visit(server)
    choose(page, max_tokens=3)
    send(page, PROMPT)
    for selector in ("button", "input", "textarea", "select", "canvas", "dialog", "ol", "nav"):
        for control in page.locator(selector).all():
            name = control.evaluate(
                "e => e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()"
                " || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent"
            )
            assert name, control.evaluate("e => e.outerHTML")
    page.click("#open-options")
    assert page.locator("#settings input, #settings select, #settings textarea").count() >= 12


# The API that the page uses


def test_models_tell_the_kind_of_model_and_its_capacity(server, chat_server):
    (model,) = server.get("/v1/models").json["data"]
    assert model["lrt"] == {"chat": False, "max_seq_len": 640, "latent": True}
    (model,) = chat_server.get("/v1/models").json["data"]
    assert model["lrt"] == {"chat": True, "max_seq_len": 128, "latent": True}


def test_latent_cosines_are_those_of_the_states_one_for_each_token(server, decoder):
    import numpy as np

    fields = {"max_tokens": 12, "temperature": 0, "prefill": "stepwise", "lrt": {"latent_cosine": True}}
    prompt = decoder.prompt_ids(PROMPT)
    found = server.complete(prompt, **fields)["choices"][0]["lrt"]["latent_cosine"]
    state = decoder.prefill([prompt[:-1]], policy="stepwise")
    before, expected, token = state.latent[0], [], prompt[-1]
    for _ in range(12):
        logits = decoder.step(state, [token])[0]
        last, token = state.latent[0], int(logits[: decoder.tokenizer.vocab_size].argmax())
        expected.append(before @ last / np.linalg.norm(before) / np.linalg.norm(last))
        before = last
    assert found == pytest.approx(expected, abs=1e-4)

    stream = server.open_stream("/v1/completions", {"prompt": prompt, **fields})
    chunks = [event["choices"][0] for event in stream.events() if event != "[DONE]"]
    stream.close()
    streamed = [value for chunk in chunks for value in chunk["lrt"]["latent_cosine"]]
    assert streamed == pytest.approx(expected, abs=1e-4)
    assert "lrt" not in server.complete(prompt, max_tokens=1)["choices"][0]


def test_the_first_token_after_a_single_one_has_no_latent_before(server):
    choice = server.complete([65], max_tokens=2, lrt={"latent_cosine": True})["choices"][0]
    first, second = choice["lrt"]["latent_cosine"]
    assert first is None
    assert -1 <= second <= 1


def test_latents_of_a_model_without_memory_are_refused_by_name(launch, export_once):
    plain = launch(where=export_once("baseline_ve"))
    reply = plain.post("/v1/completions", {"prompt": [1, 2], "lrt": {"latent_cosine": True}})
    assert reply.status == 400
    assert reply.error["param"] == "lrt.latent_cosine"
    assert plain.get("/v1/models").json["data"][0]["lrt"]["latent"] is False
