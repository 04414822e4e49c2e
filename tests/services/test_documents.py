"""What README and docs/serving.md tell people to type is run, on a free port."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


def blocks(document, language):
    return [body for kind, body in FENCE.findall((ROOT / document).read_text()) if kind == language]


@pytest.mark.parametrize(("document", "count"), [("README.md", 1), ("docs/serving.md", 5)])
def test_the_calls_of_the_documents_are_answered(server, document, count):
    lines = [line[2:] for body in blocks(document, "console") for line in body.splitlines() if line.startswith("$ ")]
    assert any(line.startswith("lrt-deploy serve my-bundle --port 8000") for line in lines)
    calls = [line for line in lines if line.startswith("curl ")]
    assert len(calls) == count
    for line in calls:
        words = shlex.split(line.replace(ADDRESS, server.about["url"]))
        result = subprocess.run([*words, "--max-time", "60"], capture_output=True, text=True, check=True)
        if "/metrics" in line:
            assert "lrt_slots" in result.stdout
        elif "stream" in line:
            assert result.stdout.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(result.stdout)["choices"]


def test_the_readme_shows_what_the_server_says_and_answers(bundle, tmp_path):
    (block,) = [body for body in blocks("README.md", "console") if "lrt-deploy serve" in body]
    serve, said, call, answered = block.splitlines()
    shutil.copytree(bundle, tmp_path / "my-bundle")  # a link would be served under the name of its target
    line = shlex.split(serve.removeprefix("$ ").replace("8000", "0"))
    command = [Path(sys.executable).parent / line[0], *line[1:], "--threads", "1"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            heard = process.stderr.readline().strip()
            (url,) = re.findall(r"http://\S+", heard)
            assert heard.replace(url, ADDRESS) == said
            words = shlex.split(call.removeprefix("$ ").replace(ADDRESS, url))
            result = subprocess.run([*words, "--max-time", "60"], capture_output=True, text=True, check=True)
        finally:
            process.terminate()
            process.communicate(timeout=120)
    found, shown = json.loads(result.stdout), json.loads(answered)
    for varies in ("id", "created"):
        assert found.pop(varies) and shown.pop(varies)
    assert found == shown


def test_the_python_client_of_the_document_runs(server):
    (code,) = blocks("docs/serving.md", "python")
    command = [sys.executable, "-c", code.replace(ADDRESS, server.about["url"])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "stepwise" in result.stdout


def test_the_metrics_of_the_document_are_those_of_the_server(server):
    named = set(re.findall(r"`((?:lrt|process)_[a-z_]+)`", (ROOT / "docs" / "serving.md").read_text()))
    lines = server.get("/metrics").body.decode().splitlines()
    of_replicas = {"lrt_replicas", "lrt_front_retries_total", "lrt_front_lost_total"}
    assert of_replicas < named
    assert named - of_replicas == {line.split()[2] for line in lines if line.startswith("# TYPE")}
