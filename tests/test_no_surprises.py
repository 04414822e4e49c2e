"""Nothing behind the user's back: every verb in a home that is empty or not there, and what it leaves, opens and says.

All verbs run in one process, by the command line's own entry, because imports are what costs time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "padded_vocab"

VERBS = """
import json, pathlib, sys

opened = []
sys.addaudithook(lambda event, details: opened.append(event) if event.startswith("socket.") else None)
checkpoint, tensorrt = sys.argv[1], sys.argv[2] == "tensorrt"
pathlib.Path("text.txt").write_text("Some text to be scored.")

import lrt_deploy
from lrt_deploy.cli.app import app

tokens = ",".join(map(str, range(1, 21)))
verbs = [
    ["export", checkpoint, "模型", "--max-seq-len", "48"],
    ["generate", "模型", "--tokens", tokens, "--max-new-tokens", "4", "--prompt-cache", "prompts"],
    ["parity", "模型", "--checkpoint", checkpoint, "--steps", "4", "--report-dir", "pages"],
    ["bench", "模型", "--prompt-tokens", "4", "--new-tokens", "4", "--prefill-lengths", "8", "--repeats", "1"],
    ["inspect", "模型"],
    ["inspect", checkpoint],
    ["doctor"],
    ["eval", "模型", "text.txt"],
    *([["build", "模型", "--backend", "tensorrt-rtx"]] if tensorrt else []),
]
codes = {}
for words in verbs:
    try:
        code = app(words, standalone_mode=False)
    except SystemExit as error:
        code = error.code
    codes[words[0]] = codes.get(words[0]) or code or 0
with lrt_deploy.open_decoder("模型") as decoder:
    state = decoder.prefill([[1, 2, 3]])
    state.save("chat.state")
pathlib.Path("result.json").write_text(json.dumps({"codes": codes, "sockets": opened}))
"""


def environment(**changes):
    """Of a shell, without what a user may have set for these libraries."""
    left_out = ("XDG_", "ORT_", "MPL", "TORCH", "HF_", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def run_all(golden_of, folder, prefix, variables):
    """Every verb in `folder`; the result, and what was said on stderr."""
    import importlib.util

    tensorrt = "tensorrt" if importlib.util.find_spec("tensorrt_rtx") else "none"
    command = [*prefix, sys.executable, "-c", VERBS, golden_of(NAME).folder, tensorrt]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert (folder / "result.json").is_file(), run.stderr
    result = json.loads((folder / "result.json").read_text())
    assert not any(result["codes"].values()), (result["codes"], run.stderr)
    return result, run.stderr


@pytest.fixture(scope="module")
def visited(golden_of, tmp_path_factory):
    """A home, a temporary folder and a working folder after every verb; under strace where there is one."""
    place = tmp_path_factory.mktemp("visited")
    for name in ("home", "tmp", "work"):
        (place / name).mkdir()
    strace = shutil.which("strace")
    prefix = [strace, "-f", "-qq", "-o", place / "trace", "-e", "trace=socket,connect"] if strace else []
    variables = environment(HOME=str(place / "home"), TMPDIR=str(place / "tmp"))
    result, said = run_all(golden_of, place / "work", prefix, variables)
    return place, result, said


@pytest.mark.slow
def test_a_home_that_was_empty_holds_our_own_cache_alone(visited):
    place, _, _ = visited
    left = {path.relative_to(place) for name in ("home", "tmp") for path in (place / name).rglob("*")}
    ours = Path("home/.cache/lrt-deploy")
    assert {path for path in left if path != ours and ours not in path.parents} <= {ours.parent}
    assert {path.name for path in (place / ours).iterdir()} <= {"matplotlib", "verified.json"}


@pytest.mark.slow
def test_the_working_folder_holds_what_was_named_alone(visited):
    place, _, _ = visited
    named = ["chat.state", "pages", "prompts", "result.json", "text.txt", "模型"]
    assert sorted(path.name for path in (place / "work").iterdir()) == sorted(named)
    assert not [path for path in (place / "work").rglob("*") if ".partial-" in path.name or ".tmp" in path.name]


@pytest.mark.slow
def test_no_socket_is_opened(visited):
    """Python's own audit, and the system's calls where strace is installed; a look-up of the user's name is local."""
    place, result, _ = visited
    assert result["sockets"] == []
    if (place / "trace").exists():
        calls = [line for line in (place / "trace").read_text().splitlines() if re.search(r"socket\(|connect\(", line)]
        assert not [line for line in calls if "AF_UNIX" not in line]


@pytest.mark.slow
def test_other_libraries_say_nothing_on_stderr(visited):
    _, _, said = visited
    strangers = re.compile(r"warn|deprecat|matplotlib|site-packages|torch\.|glyph|\[[WEF]:|\[[WEF]\]", re.IGNORECASE)
    assert not [line for line in said.splitlines() if strangers.search(line)], said


@pytest.mark.slow
def test_what_holds_prompts_is_its_owners_alone(visited):
    place, _, _ = visited
    work = place / "work"
    private = [work / "chat.state", work / "prompts", *(work / "prompts").rglob("*"), work / "pages"]
    private += [path for path in (work / "pages").iterdir() if path.suffix in (".html", ".json")]
    assert len(private) >= 8
    modes = {str(path): path.stat().st_mode & 0o777 for path in private}
    assert all(mode == (0o700 if Path(path).is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.slow
def test_without_a_home_and_with_a_user_that_nobody_knows_every_verb_works(golden_of, tmp_path):
    """As OpenShift runs containers."""
    unshare = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no process with another user can be made here: {error}")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    variables = environment(TMPDIR=str(tmp_path / "tmp"))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        variables.pop(name, None)
    run_all(golden_of, tmp_path / "work", unshare, variables)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("asked", "holds"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_before_onnx_runtime_is_loaded_unless_the_user_wants_it(asked, holds):
    variables = environment(**({} if asked is None else {"ORT_DISABLE_TELEMETRY": asked}))
    script = (
        "import sys, os, lrt_deploy.runtime; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    run = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", holds]
