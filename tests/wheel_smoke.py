"""Install a wheel into clean environments, one for each extra, and try there what the extra is for.

    python tests/wheel_smoke.py dist/lrt_deploy-0.1.0-py3-none-any.whl none export serve

`none` is the wheel alone. Each environment is a new venv without access to others, in a temporary folder; the packages
come from where pip is configured to look, at the versions of constraints.txt. The bundle that is run is made by the
environment of `export` if that is among them, else by the python that runs this, which then needs lrt-deploy. Prints a
line for each environment; exits 1 at the first fault.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import Repository, serve

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/data/golden/mr_gqa_SSSL"
VERBS = "export build generate chat parity eval serve batch bench inspect doctor package".split()  # noqa: SIM905


class Environment:
    """A clean venv with a wheel and one of its extras; everything runs in a folder outside of the tree."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        self.folder = folder / extra
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        self.install(str(wheel) if extra == "none" else f"{wheel}[{extra}]")
        self.wheel = wheel

    def install(self, name: str) -> None:
        """Install a package, and check that all that is installed fits together."""
        pip = ("-m", "pip", "--disable-pip-version-check")
        self.run("python", *pip, "install", "--quiet", "-c", ROOT / "constraints.txt", name)
        self.run("python", *pip, "check")

    def run(self, program: str, *arguments: object, input: str | None = None, **variables: str) -> str:
        """Run a program of the environment; return its stdout, or raise with its stderr."""
        command = [self.folder / "bin" / program, *map(str, arguments)]
        named = environment() | variables
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, input=input, env=named, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def lrt(self, *arguments: object, **variables: str) -> dict[str, Any]:
        """Run a verb with --json; return its document."""
        found: dict[str, Any] = json.loads(self.run("lrt-deploy", *arguments, "--json", **variables))
        return found


def environment() -> dict[str, str]:
    """The variables of this process without those that show one environment the packages of another."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def try_runtime(env: Environment, bundle: Path) -> None:
    """Every verb has its help, and those that run a bundle do it without torch."""
    for verb in VERBS:
        assert verb in env.run("lrt-deploy", verb, "--help")
    assert any(found["available"] for found in env.lrt("doctor")["backends"])
    assert env.lrt("inspect", bundle)["precisions"] == ["fp32"]
    tokens = env.lrt("generate", bundle, "--tokens", "1,2,3", "--max-new-tokens", 8, "--ignore-stop-tokens")["tokens"]
    assert len(tokens) == 8
    (env.folder / "text.txt").write_text("Some text to evaluate.\n")
    assert env.lrt("eval", bundle, env.folder / "text.txt")["bits_per_byte"] > 0
    assert env.lrt("parity", bundle, "--check", "batch-vs-alone", "--tokens", "1,2,3")["passed"]
    env.run("lrt-deploy", "chat", bundle, "--max-new-tokens", 4, input="hi\n")
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 4}}
    (env.folder / "in.jsonl").write_text(json.dumps(request) + "\n")
    env.run("lrt-deploy", "batch", bundle, env.folder / "in.jsonl", env.folder / "out.jsonl")
    assert json.loads((env.folder / "out.jsonl").read_text())["response"]["status_code"] == 200


def try_none(env: Environment, bundle: Path) -> None:
    """The wheel alone: the runtime, and errors that name the extra of what is missing."""
    installed = env.run("python", "-m", "pip", "list", "--format", "freeze").lower()
    assert not any(line.startswith(("torch==", "onnx==")) for line in installed.splitlines()), installed
    try_runtime(env, bundle)
    command = [env.folder / "bin/lrt-deploy", "export", CHECKPOINT, env.folder / "made"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert refused.returncode == 1 and "install the extra 'export'" in refused.stderr, refused.stderr


def try_export(env: Environment, bundle: Path) -> None:
    """Export another precision, compare with the checkpoint, take it from a Hub; with `report`, write the report."""
    made = shutil.copytree(bundle, env.folder / "bundle")
    env.lrt("export", CHECKPOINT, made, "--add", "--precision", "int8-weight-only")
    assert env.lrt("export", CHECKPOINT, env.folder / "none", "--dry-run")["bytes"] > 0
    compare = ("parity", made, "--checkpoint", CHECKPOINT, "--tokens", "1,2,3", "--steps", 8)
    assert env.lrt(*compare)["passed"]
    added = env.lrt("generate", made, "--tokens", "1,2,3", "--max-new-tokens", 4, "--precision", "int8-weight-only")
    assert added["precision"] == "int8-weight-only"
    names = ("model_000000.pt", "meta_000000.json")
    with serve() as hub:
        hub.repositories["owner/name"] = Repository({name: (CHECKPOINT / name).read_bytes() for name in names})
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(env.folder / "hub")}
        assert env.lrt("inspect", "hf://owner/name", **variables)["hub"]["repository"] == "owner/name"
    env.install(f"{env.wheel}[report]")
    page = Path(env.lrt(*compare, "--report-dir", env.folder / "pages")["report"])
    assert page.stat().st_size > 1000 and page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def try_ray(env: Environment, bundle: Path) -> None:
    """Serve by a replica."""
    try_serve(env, bundle, "--replicas", "1")


def try_serve(env: Environment, bundle: Path, *options: str) -> None:
    """Start the server, ask it, stop it."""
    command = [env.folder / "bin/lrt-deploy", "serve", bundle, "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the server ended"
            text += line
        url = json.loads(text)["url"]
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:  # noqa: S310 - on loopback
            assert answer.status == 200
        process.terminate()
        assert process.wait(180) in (0, 143)


def try_grammar(env: Environment, bundle: Path) -> None:
    """Generate under a schema."""
    (env.folder / "schema.json").write_text('{"type": "boolean"}')
    command = ("generate", bundle, "--prompt", "a", "--json-schema", env.folder / "schema.json", "--max-new-tokens", 8)
    assert env.lrt(*command)["tokens"]


def try_bench(env: Environment, bundle: Path) -> None:
    """Measure, and plot."""
    sizes = ("--prompt-tokens", 4, "--new-tokens", 4, "--prefill-lengths", 8, "--repeats", 1)
    env.lrt("bench", bundle, *sizes, "--plot", env.folder / "roofline.png")
    assert (env.folder / "roofline.png").read_bytes().startswith(b"\x89PNG")


def try_report(env: Environment, bundle: Path) -> None:
    """Write the page of a comparison that was made elsewhere; to make one needs the extra `export` too."""
    code = "import json, pathlib, sys; from lrt_deploy.cli.parity import write_page; "
    code += "print(write_page(pathlib.Path(sys.argv[2]), 'made', json.loads(pathlib.Path(sys.argv[1]).read_text())))"
    page = Path(env.run("python", "-c", code, bundle.with_suffix(".json"), env.folder / "pages").strip())
    assert page.stat().st_size > 1000 and page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def try_engine(env: Environment, bundle: Path) -> None:
    """Build an engine."""
    made = shutil.copytree(bundle, env.folder / "bundle")
    assert env.lrt("build", made, "--backend", "tensorrt-rtx")["plan_bytes"] > 0


TRIALS: dict[str, Callable[[Environment, Path], None]] = {
    "none": try_none,
    "export": try_export,
    "serve": try_serve,
    "ray": try_ray,
    "grammar": try_grammar,
    "bench": try_bench,
    "report": try_report,
    "tensorrt-rtx": try_engine,
}


def main(wheel: Path, extras: list[str]) -> None:
    """Make a bundle, then try each extra."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {"export": Environment(folder, wheel, "export")} if "export" in extras else {}
        bundle = folder / "made"
        code = "import sys, lrt_deploy; lrt_deploy.export_bundle(*sys.argv[1:], max_seq_len=64)"
        maker = made["export"].folder / "bin/python" if made else Path(sys.executable)
        subprocess.run([maker, "-c", code, CHECKPOINT, bundle], check=True, cwd=folder, env=environment())
        if "report" in extras:
            command = [
                maker,
                "-m",
                "lrt_deploy",
                "parity",
                bundle,
                "--checkpoint",
                CHECKPOINT,
                "--steps",
                "8",
                "--json",
            ]
            compared = subprocess.run(command, check=True, cwd=folder, env=environment(), stdout=subprocess.PIPE)
            bundle.with_suffix(".json").write_bytes(compared.stdout)
        for extra in extras:
            began = time.monotonic()
            env = made.get(extra) or Environment(folder, wheel, extra)
            TRIALS[extra](env, bundle)
            if extra != "export":
                assert "torch==" not in env.run("python", "-m", "pip", "list", "--format", "freeze")
            print(f"{extra}: works ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
