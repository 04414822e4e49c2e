"""The command line without a bundle: help, version, doctor, inspect, and how every error ends.

Errors of all kinds are raised inside a verb and must come out as one line and an exit code.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy.bundle.precisions import BACKENDS
from lrt_deploy.cli import doctor, output
from lrt_deploy.cli.app import app
from lrt_deploy.machine import Gpu

GOLDEN = Path(__file__).parent / "data" / "golden" / "mr_gqa_SSSL"
VERBS = (
    "export",
    "build",
    "generate",
    "chat",
    "parity",
    "eval",
    "serve",
    "batch",
    "package",
    "bench",
    "inspect",
    "doctor",
)


def run(*args, **kwargs):
    return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


def refusal(*args, **kwargs):
    result = run(*args, **kwargs)
    assert result.exit_code == 1, result.output
    if "--json" in args:
        error = json.loads(result.stdout)["error"]
        assert error.keys() == {"type", "message"} and result.stderr == f"error: {error['message']}\n"
    else:
        assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    return result.stderr


def python(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# start-up


def test_help_imports_nothing_heavy_and_answers_at_once():
    code = """if True:
        import json, resource, sys
        from lrt_deploy.__main__ import main
        sys.argv = ["lrt-deploy", "--help"]
        try:
            main()
        except SystemExit as end:
            assert not end.code
        used = resource.getrusage(resource.RUSAGE_SELF)
        heavy = {"torch", "onnx", "onnxruntime", "numpy", "tokenizers"} & sys.modules.keys()
        print(json.dumps([sorted(heavy), used.ru_utime + used.ru_stime]), file=sys.stderr)
    """
    result = python(code)
    assert result.returncode == 0, result.stderr
    heavy, seconds = json.loads(result.stderr)
    assert heavy == []
    assert seconds < 0.7
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_takes_json_and_debug(verb):
    result = run(verb, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.stdout and "--debug" in result.stdout


def test_commands_of_later_versions_are_not_there():
    for verb in ("build", "bench", "serve", "package"):
        assert run(verb).exit_code == 2


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert run("--version").stdout.startswith(f"lrt-deploy {version('lrt-deploy')} ")


# errors


def breaking(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(lrt_deploy, "open_decoder", fail)
    return ["generate", "bundle", "--prompt", "a"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lrt_deploy.StateError("the state is [full]"), "error: the state is [full]\n"),
        (KeyError("past_key_0"), "error: something broke inside lrt-deploy, KeyError: 'past_key_0'; run again"),
        (ValueError("two\nlines"), "ValueError: two lines; run again with --debug for the traceback\n"),
        (MemoryError(), "error: out of memory; run again"),
        (PermissionError(13, "Permission denied", "/root/x"), "error: Permission denied (/root/x); run again"),
        (OSError(28, "No space left on device"), "error: No space left on device; run again"),
        (ModuleNotFoundError("No", name="onnx_ir.passes"), "this command needs onnx_ir, which is not"),
        (ModuleNotFoundError("No module named 'zzz'", name="zzz"), "ModuleNotFoundError: No module named 'zzz'"),
    ],
)
def test_every_error_is_one_line_and_its_traceback_waits_for_debug(monkeypatch, error, message):
    command = breaking(monkeypatch, error)
    found = refusal(*command)
    assert message in found and found.count("\n") == 1
    assert refusal(*command, "--json") == found
    debugged = run(*command, "--debug")
    assert debugged.exit_code == 1 and debugged.stdout == ""
    assert "Traceback" in debugged.stderr and debugged.stderr.endswith(found)


def test_an_interrupt_exits_with_130(monkeypatch):
    result = run(*breaking(monkeypatch, KeyboardInterrupt()))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    result = run(*breaking(monkeypatch, KeyboardInterrupt()), "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["message"]) == (130, "interrupted")


@pytest.mark.parametrize(
    "command",
    [["export", "checkpoint", "", "--force"], ["generate", "", "--prompt", "a"], ["parity", "b", "--checkpoint="]],
)
def test_an_empty_path_is_not_the_current_folder(command):
    result = run(*command)
    assert result.exit_code == 2 and "is a shell variable unset?" in " ".join(result.stderr.split())


def test_usage_errors_exit_with_2_and_keep_stdout_clean():
    for command in (["generate"], ["generate", "bundle", "--nonsense"], ["nonsense"], ["parity", "bundle"]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        result = run(*command, "--json")
        assert result.exit_code == 2
        error = json.loads(result.stdout)["error"]
        assert error["type"] == "UsageError" and error["message"]
        assert result.stderr == f"error: {error['message']}\n"


@pytest.mark.parametrize(
    "verb", [["generate", "--prompt", "a"], ["chat"], ["eval", __file__], ["parity", "--checkpoint", str(GOLDEN)]]
)
def test_a_missing_bundle_is_named(verb, tmp_path):
    message = refusal(verb[0], tmp_path / "nowhere", *verb[1:], "--json")
    assert f"{tmp_path / 'nowhere'} does not exist" in message


def test_a_folder_that_is_no_bundle_is_named(tmp_path):
    assert f"{tmp_path} is not a bundle" in refusal("generate", tmp_path, "--prompt", "a")


@pytest.mark.parametrize("missing", ["torch", "onnx_ir"])
def test_export_without_its_extra_says_what_to_install(missing, tmp_path):
    code = f"import sys; sys.modules['{missing}'] = None; from lrt_deploy.__main__ import main; main()"
    result = python(code, "export", GOLDEN, tmp_path / "bundle")
    assert result.returncode == 1
    expected = f"error: this command needs {missing}, which is not installed; install the extra 'export'"
    assert result.stderr.startswith(expected) and result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_even_the_help_fails_in_one_line():
    command = [sys.executable, "-c", "from lrt_deploy.__main__ import main; main()", "--help"]
    with Path("/dev/full").open("w") as stdout:
        result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: No space left on device")


# doctor


def test_doctor_reports_every_backend_and_the_environment():
    result = run("doctor", "--json")
    assert result.exit_code == 0
    fields = json.loads(result.stdout)
    assert [backend["name"] for backend in fields["backends"]] == ["ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"]
    assert all(backend.keys() == {"name", "available", "version", "reason"} for backend in fields["backends"])
    ready = fields["backends"][0]
    assert ready["available"] is True and ready["version"] in ready["reason"]
    environment = fields["environment"]
    assert environment["cpu_count"] >= 1 and environment["memory_bytes"] > 2**28
    assert environment["versions"]["numpy"] == np.__version__
    assert (environment["versions"]["tensorrt-rtx"] is None) == (importlib.util.find_spec("tensorrt_rtx") is None)


def test_doctor_does_not_import_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; from lrt_deploy.__main__ import main; main()"
    result = python(code, "doctor", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["environment"]["versions"]["torch"] is not None


def test_doctor_says_no_when_nothing_can_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    backend = json.loads(result.stdout)["backends"][0]
    assert (backend["available"], backend["version"]) == (False, None)
    assert "onnxruntime is not installed" in backend["reason"]
    assert run("doctor").stdout == "no backend can run here\n"


def test_a_library_without_the_gpu_that_it_needs_is_reported_and_not_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4"))
    none = (None, "no GPU: none counted")
    found = doctor.report_backend("tensorrt", BACKENDS["tensorrt"], none)
    assert (found["available"], found["version"]) == (False, "11.4")
    assert "can be imported" in found["reason"] and "no GPU" in found["reason"]
    assert doctor.report_backend("tensorrt", BACKENDS["tensorrt"], (Gpu("H100", (9, 0)), "H100"))["available"]
    assert doctor.report_backend("ort-cpu", BACKENDS["ort-cpu"], none)["available"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not doctor.report_backend("ort-cpu", BACKENDS["ort-cpu"], none)["available"]


# inspect


def test_inspect_reads_a_checkpoint_folder_or_file():
    for path in (GOLDEN, GOLDEN / "model_000000.pt"):
        result = run("inspect", path, "--json")
        assert result.exit_code == 0, result.stderr
        fields = json.loads(result.stdout)
        assert fields["config"]["window_pattern"] == "SSSL" and fields["step"] == 0
        assert fields["parameters"] == {"matrices": 218624, "tables": 61440, "other": 12}
        assert fields["tensors"] == 45 and fields["dtypes"] == {"float32": 45}
        assert fields["tokenizer"] == {"found": True, "tokens": 320, "error": None}
        assert len(fields["sha256"]) == 64 and fields["file"].endswith("model_000000.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("engine.plan", b"x", "has no sidecar"),
        ("notes.txt", b"x", "none of the things"),
        ("broken.onnx", b"\xff" * 50, "not an ONNX graph"),
        ("empty.onnx", b"", "holds no nodes"),
        ("model_000001.pt", b"x", "meta_000001.json is missing"),
    ],
)
def test_inspect_refuses_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    found = refusal("inspect", tmp_path / name)
    assert message in found and name.split(".")[0].replace("model", "") in found


def test_inspect_refuses_what_is_not_there_or_holds_nothing(tmp_path):
    assert "does not exist" in refusal("inspect", tmp_path / "nowhere")
    assert "none of the things" in refusal("inspect", tmp_path)


# output


def test_a_document_is_valid_json_whatever_is_in_it(capsys):
    output.document({"a": float("inf"), "b": np.float32(1.5), "c": np.arange(2), "d": (Path("x"), None), "e": "ü"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 1.5, "c": [0, 1], "d": ["x", None], "e": "ü"}


def test_progress_away_from_a_terminal_is_a_line_for_each_new_phase(capsys):
    for quiet, expected in ((False, "tracing\nhashing\n"), (True, "")):
        with output.progress(quiet) as progress:
            for what, done in (("tracing", 0), ("tracing", 1), ("hashing", 2)):
                progress(what, done, 2)
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1300000, "1.3 MB"), (5 * 10**12, "5000.0 GB")]
)
def test_sizes_are_said_as_people_say_them(count, text):
    assert output.bytes_text(count) == text


def test_guarded_verbs_keep_their_options():
    names = {command.name for command in app.registered_commands}
    assert names == set(VERBS)
    assert typer.main.get_command(app).commands["eval"].params


def test_a_machine_without_a_driver_is_told_so_and_no_driver_version(monkeypatch):
    from lrt_deploy import machine

    success, old = object(), 35
    fake = SimpleNamespace(
        cudaError_t=SimpleNamespace(cudaSuccess=success),
        cudaGetDeviceCount=lambda: (old, 0),
        cudaDriverGetVersion=lambda: (success, 0),
        cudaGetErrorString=lambda error: (success, b"CUDA driver version is insufficient for CUDA runtime version"),
    )
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: fake)
    assert machine.find_gpu() == (None, "no NVIDIA driver is installed")
    fake.cudaDriverGetVersion = lambda: (success, 11000)
    assert machine.find_gpu()[1].endswith("driver version is insufficient for CUDA runtime version")
