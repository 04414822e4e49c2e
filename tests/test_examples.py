"""The examples that work on states run as their docstrings say, on a tiny bundle, and do what they claim."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import lrt_deploy


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once("mr_gqa_SSSL")


def run(root, name, *arguments, **options):
    command = [sys.executable, root / "examples" / name, *map(str, arguments)]
    options = {"timeout": 120} | options
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    return result


def test_a_chat_is_resumed_in_another_process(root, bundle, tmp_path):
    first = run(root, "resume_chat.py", bundle, tmp_path / "chat.state", "hi")
    second = run(root, "resume_chat.py", bundle, tmp_path / "chat.state", "and")
    read = [int(result.stderr.split()[0]) for result in (first, second)]
    saved = int(first.stderr.split("with the message, ")[1].split()[0])
    assert saved < read[1] and read[0] < saved
    with lrt_deploy.open_decoder(bundle) as decoder:  # the second answer follows from all of the first process's tokens
        (history,) = decoder.load_state(tmp_path / "chat.state").tokens
        events = list(decoder.generate(history[: read[1]], 48))
    assert "".join(event.text for event in events) + "\n" == second.stdout


def test_n_best_ranks_distinct_continuations(root, bundle):
    lines = run(root, "n_best.py", bundle, "abc", 5).stdout.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(set(lines)) == 5 and scores == sorted(scores, reverse=True)


def test_the_batch_server_answers_each_request_as_if_alone(root, bundle):
    requests = [{"prompt": text, "max_new_tokens": n} for text, n in (("ab", 5), ("c", 9), ("def", 3))]
    lines = [json.dumps(request) for request in requests]
    lines += ["nonsense", '{"prompt": []}', '{"prompt": "a", "speed": 1}', "5", "null", "{}", '{"prompt": 5}']
    output = run(root, "batch_server.py", bundle, input="\n".join(lines)).stdout
    found = [json.loads(line) for line in output.splitlines()]
    assert sum("error" in entry for entry in found) == 7
    with lrt_deploy.open_decoder(bundle) as decoder:
        for number, request in enumerate(requests):
            tokens = [entry["token"] for entry in found if entry.get("request") == number and "token" in entry]
            alone = decoder.generate(request["prompt"], request["max_new_tokens"], policy="stepwise")
            assert tokens == [event.token for event in alone]


def test_a_test_of_the_users_own_passes_on_a_right_bundle_and_fails_on_another_model(root, bundle, golden_of, tmp_path):
    from random_models import random_model, write_native

    golden = golden_of("mr_gqa_SSSL")
    write_native(random_model(golden.model().config, seed=1), tmp_path / "other")

    def tested(checkpoint):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            root / "examples" / "test_my_model.py",
        ]
        named = {"LRT_CHECKPOINT": str(checkpoint), "LRT_BUNDLE": str(bundle)}
        return subprocess.run(
            [*command, "--rootdir", tmp_path, "-c", "/dev/null"],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=tmp_path,
            env=os.environ | named,
        )

    right, wrong = tested(golden.folder), tested(tmp_path / "other")
    assert right.returncode == 0 and "1 passed" in right.stdout, right.stdout
    assert wrong.returncode == 1 and "FAIL: weights: " in wrong.stdout, wrong.stdout


@pytest.mark.parametrize("name", ["n_best", "resume_chat", "batch_server", "train_tiny", "walkthrough"])
def test_each_example_says_what_it_does(root, name):
    text = run(root, f"{name}.py", "--help").stdout
    assert text.startswith("usage: ") and f"examples/{name}.py" in text


def own_text(root, file):
    file.write_text("\n\n".join(path.read_text() for path in sorted((root / "docs").glob("*.md"))))
    return file


def test_the_walkthrough_goes_from_a_text_of_ones_own_to_two_turns_of_a_chat(root, tmp_path):
    text = own_text(root, tmp_path / "own.txt")
    done = run(root, "walkthrough.py", "--quick", "--text", text, "--folder", tmp_path / "walk", timeout=480)
    assert "\nfp32: PASS: 8 of 8 greedy tokens equal" in done.stdout
    assert re.search(r"\nfp32: \d\.\d{3} bits per byte over [\d,]+ bytes\n", done.stdout)
    assert done.stdout.count("\nuser: ") == done.stdout.count("\nassistant: ") == 2
    assert done.stderr.count('"path":"/v1/chat/completions","status":200') == 2
    assert "the server ended with exit code 0" in done.stdout
    from lrt_deploy.model.checkpoint import open_checkpoint

    opened = open_checkpoint(tmp_path / "walk" / "checkpoint")
    opened.check_tensors()
    assert opened.config.n_embd == 32
    with lrt_deploy.open_decoder(tmp_path / "walk" / "bundle") as decoder:
        assert (tmp_path / "walk" / "sample.txt").read_text()[:100] in text.read_text()
        assert decoder.tokenizer.vocab_size == opened.config.vocab_size


def test_the_cells_of_the_walkthrough_run_without_a_file_or_arguments_of_their_own(root):
    source = (root / "examples" / "walkthrough.py").read_text()
    cells = re.split(r"^# %%.*\n", source, flags=re.MULTILINE)[1:]
    assert len(cells) >= 14
    for cell in cells:
        compile(cell, "cell", "exec")  # none is cut in the middle of a statement


def test_a_text_that_is_too_short_to_train_on_is_refused(root, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("Too little.")
    command = [sys.executable, root / "examples/train_tiny.py", "--out", tmp_path / "other", "--text", text]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1 and "expected at least 100" in refused.stderr
