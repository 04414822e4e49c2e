"""The verbs on a real bundle: what they print where, their JSON fields, exit codes and error messages.

One export serves the whole module. What needs no bundle (help, doctor, errors in general) is in test_cli_surface.py.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.bundle.manifest import read_manifest, write_manifest
from lrt_deploy.cli.app import app

GOLDEN = Path(__file__).parent / "data" / "golden" / "mr_gqa_SSSL"
OTHER_GOLDEN = GOLDEN.parent / "mr_mha_L"
COMMAND = [sys.executable, "-c", "from lrt_deploy.__main__ import main; main()"]
CAPACITY = 128


def run(*args, **kwargs):
    return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


def answer(*args, **kwargs):
    """The JSON document of a command that succeeds; nothing else may be on stdout."""
    result = run(*args, "--json", **kwargs)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*args, code=1, **kwargs):
    """The message of a command that must fail; stdout has the error as JSON if that is asked for, else nothing."""
    result = run(*args, **kwargs)
    assert result.exit_code == code, result.output
    if "--json" in args:
        assert json.loads(result.stdout)["error"].keys() == {"type", "message"}
    else:
        assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("error: ") == 1
    return result.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    target = tmp_path_factory.mktemp("cli") / "bundle"
    return target, run("export", GOLDEN, target, "--max-seq-len", CAPACITY, "--max-batch-size", 3, "--json")


@pytest.fixture(scope="module")
def bundle(exported):
    return exported[0]


@pytest.fixture(scope="module")
def without_tokenizer(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "no-tokenizer"
    shutil.copytree(bundle, folder)
    shutil.rmtree(folder / "tokenizer")
    manifest = msgspec.structs.replace(read_manifest(folder), tokenizer_tokens=None)
    (folder / "manifest.json").unlink()
    (folder / "manifest.sha256").unlink()
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "golden.npz")


# export


def test_export_answers_with_the_manifest_and_where_the_bundle_is(exported):
    target, result = exported
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    assert fields["bundle"] == str(target)
    assert fields["seconds"] > 0
    manifest = json.loads((target / "manifest.json").read_text())
    assert {name: fields[name] for name in manifest} == manifest
    assert (manifest["max_seq_len"], manifest["max_batch_size"]) == (CAPACITY, 3)


def test_export_refuses_an_existing_target_without_force(bundle):
    assert "--force" in refusal("export", GOLDEN, bundle)


def test_export_hands_its_options_on_and_sums_up(bundle, monkeypatch, tmp_path):
    seen = {}

    def fake(checkpoint, target, **kwargs):
        seen.update(kwargs, checkpoint=checkpoint, target=target)
        kwargs["progress"]("tracing", 0, 0)
        return read_manifest(bundle)

    monkeypatch.setattr(lrt_deploy, "export_bundle", fake)
    options = ["--tokenizer", tmp_path, "--step", 7, "--precision", "fp32", "--precision", "int8", "--force"]
    options += [
        "--calibration",
        tmp_path / "text",
        "--keep-high",
        "gate",
        "--keep-high",
        "none",
        "--compensate",
        "--int4-block",
        64,
        "--host-embeddings",
    ]
    result = run("export", "from", bundle, *options, "--max-seq-len", 99, "--max-batch-size", 5)
    assert result.exit_code == 0, result.stderr
    assert seen.pop("progress")
    assert seen == {
        "checkpoint": "from",
        "target": bundle,
        "precision": ["fp32", "int8"],
        "max_seq_len": 99,
        "max_batch_size": 5,
        "tokenizer": tmp_path,
        "step": 7,
        "force": True,
        "calibration": tmp_path / "text",
        "keep_high": ["gate"],
        "compensate": True,
        "int4_block": 64,
        "host_embeddings": True,
        "add": False,
    }
    assert result.stdout.startswith(f"exported {bundle} (") and result.stdout.count("\n") == 1
    for part in ("tracing", "4 layers, width 64, 218.6K matrix + 61.4K table parameters", "fp32", "stepwise"):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-seq-len", "321"], "max_seq_len is 321"),
        (["--step", "5"], "no step 5"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--int4-block", "32"], "fp32 has no int4 weights"),
    ],
)
def test_export_refuses_what_cannot_be_and_leaves_nothing(options, message, tmp_path):
    assert message in refusal("export", GOLDEN, tmp_path / "target", *options)
    assert list(tmp_path.iterdir()) == []


# generate


def test_generate_answers_with_every_field(bundle, arrays):
    prompt, expected = arrays["prompt_ids"].tolist(), arrays["greedy_ids"].tolist()
    tokens = ",".join(map(str, prompt))
    fields = answer("generate", bundle, "--tokens", tokens, "--max-new-tokens", len(expected), "--ignore-stop-tokens")
    assert fields["tokens"] == expected
    assert fields["prompt_tokens"] == len(prompt)
    assert fields["finish_reason"] == "length"
    assert fields["ttft_ms"] > 0 and fields["tpot_ms"] > 0
    assert fields["prefill"].keys() >= {"policy", "passes", "residual"}
    assert (fields["backend"], fields["precision"]) == ("ort-cpu", "fp32")
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert fields["text"] == decoder.tokenizer.decode(expected)


def test_generate_streams_the_text_of_the_json_and_sums_up_on_stderr(bundle):
    text = answer("generate", bundle, "--prompt", "hello", "--max-new-tokens", 12)["text"]
    result = run("generate", bundle, "--prompt", "hello", "--max-new-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == text + "\n"
    for part in ("5 prompt tokens", "12 new (length)", "ort-cpu, fp32"):
        assert part in result.stderr


def test_one_token_has_no_time_per_following_token(bundle):
    fields = answer("generate", bundle, "--prompt", "a", "--max-new-tokens", 1)
    assert len(fields["tokens"]) == 1
    assert fields["tpot_ms"] is None


def test_the_three_ways_to_give_a_prompt_agree(bundle, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Grüße\r\n".encode())
    with lrt_deploy.open_decoder(bundle) as decoder:
        ids = decoder.tokenizer.encode_prompt("Grüße")
    ways = [
        answer("generate", bundle, "--prompt", "Grüße"),
        answer("generate", bundle, "--prompt-file", tmp_path / "prompt.txt"),
        answer("generate", bundle, "--prompt-file", "-", input="Grüße\n".encode()),
        answer("generate", bundle, "--tokens", ", ".join(map(str, ids))),
    ]
    assert all(way["prompt_tokens"] == len(ids) for way in ways)
    assert all(way["tokens"] == ways[0]["tokens"] for way in ways)


def test_sampling_options_reach_the_sampler(bundle):
    common = ["generate", bundle, "--prompt", "a", "--ignore-stop-tokens"]
    greedy = answer(*common)["tokens"]
    hot = [*common, "--temperature", 3]
    first, again, other = (answer(*hot, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    assert answer(*hot, "--seed", 1, "--top-k", 1)["tokens"] == greedy
    assert answer(*hot, "--seed", 1, "--top-p", 1e-9)["tokens"] == greedy
    assert answer(*hot, "--seed", 1, "--min-p", 1)["tokens"] == greedy
    assert answer(*common, "--repetition-penalty", 100)["tokens"] != greedy


def test_stop_text_ends_the_answer_and_is_left_out(bundle):
    text = answer("generate", bundle, "--prompt", "hello")["text"]
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isascii())
    fields = answer("generate", bundle, "--prompt", "hello", "--stop", "never", "--stop", stop)
    assert fields["finish_reason"] == "stop_string"
    assert fields["text"] == text[: text.index(stop)]


def test_a_stop_token_is_the_last_of_the_tokens_and_has_no_text(bundle, monkeypatch):
    from lrt_deploy.text.tokenizer import Tokenizer

    greedy = answer("generate", bundle, "--tokens", "1,2,3", "--ignore-stop-tokens")["tokens"]
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset({greedy[0]}))
    fields = answer("generate", bundle, "--tokens", "1,2,3")
    assert (fields["tokens"], fields["finish_reason"], fields["text"]) == (greedy[:1], "stop_token", "")
    assert len(answer("generate", bundle, "--tokens", "1,2,3", "--ignore-stop-tokens")["tokens"]) == len(greedy)


def test_a_lowered_capacity_ends_the_answer(bundle):
    fields = answer("generate", bundle, "--tokens", "1,2,3", "--max-seq-len", 8, "--ignore-stop-tokens")
    assert fields["finish_reason"] == "capacity"
    assert len(fields["tokens"]) == 8 - 3 + 1


def test_without_a_tokenizer_ids_go_in_and_come_out(without_tokenizer):
    command = ["generate", without_tokenizer, "--tokens", "1,2,3", "--max-new-tokens", 5]
    fields = answer(*command)
    assert fields["text"] is None
    assert run(*command).stdout.split() == list(map(str, fields["tokens"]))
    assert "no tokenizer" in refusal("generate", without_tokenizer, "--prompt", "hello")


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        ["--prompt", "a", "--tokens", "1"],
        ["--prompt", "a", "--prompt-file", "-"],
        ["--tokens", "1,two"],
        ["--tokens", "1,,2"],
        ["--tokens", "1.5"],
        ["--prompt", "a", "--max-new-tokens", "many"],
    ],
)
def test_a_prompt_that_is_missing_double_or_malformed_is_a_usage_error(bundle, prompt):
    refusal("generate", bundle, *prompt, code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-1,2"], "token id -1"),
        (["--tokens", "1,320"], "token id 320 at index 1"),
        (["--tokens", "1," + "9" * 25], "prompt 0"),
        (["--tokens", ""], "empty"),
        (["--tokens", ",".join(["1"] * (CAPACITY + 1))], f"capacity of {CAPACITY}"),
        (["--prompt", "a", "--precision", "fp16"], "holds fp32, not fp16"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--threads", "0"], "threads is 0"),
        (["--prompt", "a", "--max-seq-len", "129"], "max_seq_len is 129"),
        (["--prompt", "a", "--stop", ""], "stop strings"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_generate_refuses_by_name(bundle, options, message, form):
    assert message in refusal("generate", bundle, *options, *form)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "huge"])
def test_texts_are_read_from_regular_files_within_a_size(bundle, target, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**28 + 1)
    reason = {"/dev/zero": "character device", "pipe": "named pipe", "huge": "at most 268435456"}[target]
    assert reason in refusal("generate", bundle, "--prompt-file", tmp_path / target)
    assert reason in refusal("eval", bundle, tmp_path / target)


def test_a_prompt_file_that_is_not_text_is_refused(bundle):
    assert "not UTF-8" in refusal("generate", bundle, "--prompt-file", "-", input=b"\xff\xfe")


def test_verify_finds_what_is_altered(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    weights = tmp_path / "copy" / "graphs" / "fp32" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "weights.bin does not match its hash" in refusal("inspect", tmp_path / "copy", "--verify")
    assert "altered" in refusal("generate", tmp_path / "copy", "--prompt", "a", "--verify")


# parity


def test_parity_of_an_intact_bundle_passes_with_every_field(bundle):
    fields = answer("parity", bundle, "--checkpoint", GOLDEN, "--steps", 16)
    names = "passed verdict checkpoint_matches backend precision steps max_abs_logit_error max_abs_latent_error mean_kl"
    assert fields.keys() >= {*names.split(), "max_kl", "top1_agreement", "first_divergence", "prefill"}
    assert fields["prefill"].keys() >= {"policy", "passes", "residual", "max_abs_latent_error"}
    assert (fields["passed"], fields["checkpoint_matches"], fields["steps"]) == (True, True, 16)
    assert 0 < fields["max_abs_logit_error"] < 1e-4
    assert (fields["backend"], fields["precision"]) == ("ort-cpu", "fp32")


def test_parity_takes_what_fits_unless_told(bundle, without_tokenizer):
    short = answer("parity", bundle, "--checkpoint", GOLDEN, "--tokens", "1,2,3", "--max-seq-len", 20)
    assert short["steps"] == 17
    made_up = answer("parity", without_tokenizer, "--checkpoint", GOLDEN, "--max-seq-len", 20)
    assert made_up["passed"] and made_up["steps"] == 10
    told = refusal("parity", bundle, "--checkpoint", GOLDEN, "--tokens", "1,2", "--steps", 19, "--max-seq-len", 20)
    assert "20" in told


def test_parity_against_a_reference_in_float64_passes_and_shows_less_noise_than_is_allowed(bundle):
    fields = answer("parity", bundle, "--checkpoint", GOLDEN, "--steps", 8, "--float64")
    assert fields["passed"]
    plain = answer("parity", bundle, "--checkpoint", GOLDEN, "--steps", 8)
    assert 0 < fields["max_abs_logit_error"] != plain["max_abs_logit_error"]
    shown = run("parity", bundle, "--checkpoint", GOLDEN, "--steps", 8).stderr
    assert "free-running token agreement" in shown and "drift growth" in shown


def test_parity_with_other_weights_fails_with_exit_code_1(bundle, tmp_path):
    import torch

    shutil.copytree(GOLDEN, tmp_path / "changed")
    weights = tmp_path / "changed" / "model_000000.pt"
    tensors = torch.load(weights, weights_only=True)
    tensors["transformer.h.1.mlp.c_fc.weight"] *= 1.05
    torch.save(tensors, weights)
    command = ["parity", bundle, "--checkpoint", tmp_path / "changed", "--steps", 8]
    result = run(*command)
    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL") and result.stdout.count("\n") == 1
    assert "blocks.1.mlp_in is not the checkpoint's" in result.stdout and "nothing was run" in result.stdout
    assert "checkpoint_matches: no" in result.stdout
    assert "rollout" not in result.stderr and "error: " not in result.stderr
    fields = json.loads(run(*command, "--json").stdout)
    assert (fields["passed"], fields["checkpoint_matches"]) == (False, False)
    assert (fields["weights"]["passed"], fields["weights"]["worst"]["matrix"]) == (False, "blocks.1.mlp_in")
    assert fields["weights"]["failed"] == ["blocks.1.mlp_in"]
    assert fields["max_abs_logit_error"] is None and fields["positions"]["position"] == []
    result = run(*command, "--bisect")
    verdict, place = result.stdout.splitlines()
    assert result.exit_code == 1 and verdict.startswith("FAIL")
    assert place.startswith("weights: blocks.1.mlp_in is not the checkpoint's: row ")
    found = json.loads(run(*command, "--bisect", "--json").stdout)["bisect"]
    assert (found["kind"], found["layer"], found["tensor"]) == ("weights", 1, "blocks.1.mlp_in")


def test_parity_writes_a_report_where_asked_and_says_where(bundle, tmp_path):
    fields = answer(
        "parity", bundle, "--checkpoint", GOLDEN, "--steps", 8, "--report-dir", tmp_path / "new" / "reports"
    )
    page = Path(fields["report"])
    assert page == tmp_path / "new" / "reports" / "parity-ort-cpu-fp32.html"
    assert sorted(path.suffix for path in page.parent.iterdir()) == [".html", ".json", ".png"]
    stored = json.loads(page.with_suffix(".json").read_text())
    assert (stored["verdict"], stored["positions"]) == (fields["verdict"], fields["positions"])
    assert stored["verdict"].partition(" ")[2] in html.unescape(page.read_text())
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not (bundle / "reports").exists()


def test_a_report_that_cannot_be_written_comes_after_the_verdict_which_decides_the_exit_code(bundle, tmp_path):
    (tmp_path / "file").touch()
    command = ["parity", bundle, "--checkpoint", GOLDEN, "--steps", 4, "--report-dir", tmp_path / "file" / "reports"]
    result = run(*command)
    assert result.exit_code == 0 and result.stdout.startswith("PASS")
    assert "the report could not be written to " in result.stderr and "--report-dir" in result.stderr
    fields = json.loads(run(*command, "--json").stdout)
    assert fields["passed"] and fields["report"] is None and "could not be written" in fields["report_error"]


def test_parity_with_another_architecture_names_the_fields(bundle):
    message = refusal("parity", bundle, "--checkpoint", OTHER_GOLDEN, "--steps", 4)
    assert "window_pattern is 'L' and not 'SSSL'" in message and "n_kv_head" in message
    assert "vocab_size" not in message


# eval


def bits_per_byte(arrays, lengths):
    """From the authors' own sequential logits."""
    logits, targets = arrays["seq_logits"][:, :-1].astype(np.float64), arrays["ids"][:, 1:]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    counted = lengths[targets]
    return nats[counted > 0].sum() / np.log(2) / counted.sum(), int(counted.sum())


def test_eval_of_token_rows_is_what_the_authors_logits_give(bundle, arrays, tmp_path):
    ids = arrays["ids"]
    np.savez(tmp_path / "rows.npz", x=ids[:, :-1], y=ids[:, 1:])
    fields = answer("eval", bundle, tmp_path / "rows.npz", "--batch-size", 2)
    lengths = np.array(json.loads((bundle / "tokenizer" / "token_bytes.json").read_text()))
    expected, total = bits_per_byte(arrays, lengths)
    assert fields["bits_per_byte"] == pytest.approx(expected, abs=1e-5)
    assert fields["bytes"] == total
    assert fields.keys() >= {"tokens", "seconds", "backend", "precision"}


def test_eval_of_a_text_counts_its_bytes(bundle, tmp_path):
    text = "A river\r\nrose. " * 20
    (tmp_path / "text.txt").write_bytes(text.encode())
    fields = answer("eval", bundle, tmp_path / "text.txt", "--max-seq-len", 64)
    assert fields["bytes"] == len(text.encode())
    assert fields["tokens"] > 0 and 0 < fields["bits_per_byte"] < 30
    result = run("eval", bundle, tmp_path / "text.txt", "--max-seq-len", 64)
    assert result.stdout == f"{fields['bits_per_byte']:.6f} bits per byte\n"
    assert "positions 32 to 63" in result.stderr
    assert sum(bucket["tokens"] for bucket in fields["buckets"]) == fields["tokens"]


def test_eval_refuses_files_that_are_not_what_they_should_be(bundle, without_tokenizer, arrays, tmp_path):
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=arrays["ids"], y=arrays["ids"])
    rows.write_bytes(rows.read_bytes()[:100])
    assert "rows.npz" in refusal("eval", bundle, rows)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xff")
    assert "text.txt" in refusal("eval", bundle, tmp_path / "text.txt")
    assert "nowhere.txt" in refusal("eval", bundle, tmp_path / "nowhere.txt")
    (tmp_path / "text.txt").write_text("fine")
    assert "no tokenizer" in refusal("eval", without_tokenizer, tmp_path / "text.txt")
    assert "0" in refusal("eval", bundle, tmp_path / "text.txt", "--batch-size", 0)


# inspect


def test_inspect_gives_a_bundles_manifest_as_it_is_on_disk(bundle):
    assert answer("inspect", bundle) == json.loads((bundle / "manifest.json").read_text())
    result = run("inspect", bundle)
    assert result.stdout == f"{bundle} is a bundle\n"
    assert "model_000000.pt, step 0" in result.stderr and "stepwise" in result.stderr


def test_inspect_refuses_an_altered_manifest(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    text = (tmp_path / "copy" / "manifest.json").read_text()
    (tmp_path / "copy" / "manifest.json").write_text(text.replace('"n_layer": 4', '"n_layer": 5'))
    assert "altered" in refusal("inspect", tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    assert "not a bundle" in refusal("inspect", tmp_path / "copy")


def test_inspect_explains_a_graph_found_alone(bundle, tmp_path):
    graph = tmp_path / "alone.onnx"
    shutil.copy(bundle / "graphs" / "fp32" / "decode_step.windowed.onnx", graph)
    fields = answer("inspect", graph)
    assert fields["opset"] == {"ai.onnx": 24}
    assert fields["inputs"][0] == {"name": "input_ids", "dtype": "int64", "dims": ["batch", 1]}
    assert fields["outputs"][0] == {"name": "logits", "dtype": "float32", "dims": ["batch", "rows", 320]}
    assert fields["operators"]["TensorScatter"] == 8
    assert fields["contract"]["flavour"] == "windowed" and fields["model"]["n_layer"] == 4
    assert fields["external_files"] == ["weights.bin"]
    weights = (bundle / "graphs" / "fp32" / "weights.bin").stat().st_size
    assert 0.9 * weights < fields["initializer_bytes"] < 1.1 * weights
    assert "windowed flavour" in run("inspect", graph).stdout


# as a process


def process(*args, **kwargs):
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **kwargs)


def test_the_installed_command_generates_without_torch_and_onnx(bundle):
    code = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; from lrt_deploy.__main__ import main; main()"
    command = [sys.executable, "-c", code, "generate", str(bundle), "--prompt", "a", "--json"]
    result = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"]
    assert Path(sys.executable).with_name("lrt-deploy").is_file()


def test_a_reader_that_is_gone_ends_it_quietly(bundle):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "generate", str(bundle), "--prompt", "a"]
    with os.fdopen(writer, "wb") as stdout:
        result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line(bundle):
    command = [*COMMAND, "inspect", str(bundle), "--json"]
    with Path("/dev/full").open("wb") as stdout:
        result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: No space left on device") and result.stderr.count(b"\n") == 1


def test_ctrl_c_ends_a_chat_with_130_and_no_traceback(bundle):
    command = [*COMMAND, "chat", str(bundle)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as child:
        assert b"/help" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest == b"interrupted\n"
