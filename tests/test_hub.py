"""Checkpoints on the Hub: fetched by the real `huggingface_hub` from a server on loopback, and nothing besides.

Whatever a repository or a connection does, the cache holds whole files or none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import random_model, write_native

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import Repository, serve

from lrt_deploy import export_bundle
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import CheckpointError, ConfigError, InputError
from lrt_deploy.exporters.bundle import find_tokenizer
from lrt_deploy.model.checkpoint import open_checkpoint
from lrt_deploy.model.hub import HubName, check_source

GOLDEN = Path(__file__).parent / "data" / "golden" / "padded_vocab"
CONFIG = LRTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
BESIDE = {"README.md": b"# A model", "pytorch_model.bin": b"\x80\x02.", "optim_000001_rank0.pt": b"PK", "run.py": b"1"}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The files of a checkpoint in the native layout."""
    folder = tmp_path_factory.mktemp("native")
    write_native(random_model(CONFIG), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def authors():
    """The files of a checkpoint in the authors' layout."""
    names = ("model_000000.pt", "meta_000000.json", "tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt")
    return {name: (GOLDEN / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def server():
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A server without repositories, which the library takes for the Hub, with an empty cache."""
    from huggingface_hub import constants

    server.repositories.clear()
    server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return server


def in_cache(folder):
    """The files that the cache offers by name, and the contents that it holds."""
    paths = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    offered = sorted(
        "/".join(path.parts[path.parts.index("snapshots") + 2 :]) for path in paths if "snapshots" in path.parts
    )
    return offered, [path for path in paths if path.parent.name == "blobs"]


def fails(name, step=None):
    with pytest.raises((CheckpointError, ConfigError, InputError)) as raised:
        open_checkpoint(name, step)
    return str(raised.value)


def documents(text):
    """The JSON documents that a text begins with, and the text after them."""
    found = []
    while text.startswith("{"):
        document, end = json.JSONDecoder().raw_decode(text)
        found, text = [*found, document], text[end:].lstrip()
    return [*found, text]


VERBS = """
import json, sys
from lrt_deploy.cli.app import app
name = sys.argv[1]
assert "torch" not in sys.modules
for words in (
    ["inspect", name, "--json"],
    ["export", name, "dry", "--dry-run", "--json"],
    ["export", name, "bundle", "--json"],
    ["parity", "bundle", "--checkpoint", name, "--steps", "4", "--json"],
    ["inspect", "bundle"],
):
    assert app(words, standalone_mode=False) == 0, words
"""


def test_every_verb_that_names_a_checkpoint_takes_one_on_the_hub(server, native, tmp_path):
    server.repositories.clear()
    server.requests.clear()
    server.repositories["acme/tiny"] = repository = Repository(native | BESIDE, revisions=("main", "v1"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DO_NOT"))}
    variables = kept | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", VERBS, "hf://acme/tiny@v1"]
    run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    inspected, estimate, manifest, parity, shown = documents(run.stdout)
    origin = {"repository": "acme/tiny", "revision": "v1", "commit": repository.commit}
    assert inspected["hub"] == parity["provenance"]["checkpoint"]["hub"] == origin
    assert manifest["provenance"]["checkpoint"]["hub"] == origin
    assert estimate["bytes"] and not (tmp_path / "dry").exists()
    assert parity["passed"] and parity["checkpoint_matches"]
    assert "is a bundle" in shown and repository.commit in run.stderr
    assert sorted(server.fetched()) == ["config.json", "model.safetensors"]  # once, and nothing besides
    others = {line for line in server.requests if "/resolve/" not in line}
    assert others == {"GET /api/models/acme/tiny/revision/v1"}  # no telemetry
    assert (tmp_path / "home" / "hub" / "models--acme--tiny" / "refs" / "v1").read_text() == repository.commit


def test_of_several_steps_the_chosen_one_is_fetched_and_its_tokenizer(hub, authors):
    place = "base_checkpoints/d4"
    files = {}
    for step in ("000000", "000007"):
        files[f"{place}/model_{step}.pt"] = authors["model_000000.pt"]
        files[f"{place}/meta_{step}.json"] = authors["meta_000000.json"]
    files |= {"tokenizer/tokenizer.pkl": authors["tokenizer/tokenizer.pkl"], "tokenizer/token_bytes.pt": b"PK"}
    hub.repositories["acme/many"] = Repository(files | BESIDE)
    opened = open_checkpoint("hf://acme/many", 0)
    assert hub.fetched() == ["tokenizer/tokenizer.pkl", f"{place}/meta_000000.json", f"{place}/model_000000.pt"]
    assert opened.step == 0 and opened.chosen == f"took {place}, step 0"
    assert find_tokenizer(opened, None).byte_lengths
    assert open_checkpoint(f"hf://acme/many/{place}").step == 7
    assert open_checkpoint(f"hf://acme/many@main/{place}/model_000000.pt").step == 0
    assert "acme/many/base_checkpoints/d4 has no step 3; it has step 0, 7" in fails("hf://acme/many", 3)
    assert f"hf://acme/many/{place}/d9 does not exist" in fails(f"hf://acme/many/{place}/d9")


def test_offline_the_cache_is_enough(hub, native, monkeypatch):
    from huggingface_hub import constants

    hub.repositories["acme/tiny"] = Repository(native)
    first = open_checkpoint("hf://acme/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for name in ("hf://acme/tiny", "hf://acme/tiny@main", f"hf://acme/tiny@{first.origin.commit}"):
        again = open_checkpoint(name)
        assert (again.sha256, again.origin.commit) == (first.sha256, first.origin.commit)
    assert "HF_HUB_OFFLINE forbids" in fails("hf://acme/other")
    assert "HF_HUB_OFFLINE forbids" in fails("hf://acme/tiny@v2")
    assert not hub.requests


def test_a_new_commit_of_a_branch_is_fetched_and_the_old_one_stays(hub, native):
    hub.repositories["acme/tiny"] = Repository(native)
    first = open_checkpoint("hf://acme/tiny")
    hub.repositories["acme/tiny"].files = native | {"README.md": b"new"}
    second = open_checkpoint("hf://acme/tiny")
    assert first.origin.commit != second.origin.commit and first.sha256 == second.sha256
    assert hub.fetched().count("model.safetensors") == 1  # the same contents
    hub.repositories["acme/tiny"].files = native
    assert open_checkpoint("hf://acme/tiny").model_file == first.model_file


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("gated", "its owner admits users one by one"),
        ("private", "has no such repository, or shows it to its owners only"),
        ("failing", "answers with 500; try again later"),
    ],
)
def test_a_repository_that_may_not_be_read_is_refused_with_the_way_to_it(hub, native, tmp_path, fault, says):
    hub.repositories["acme/tiny"] = Repository(native, fault=fault)
    assert says in fails("hf://acme/tiny")
    assert in_cache(tmp_path) == ([], [])


def test_what_is_not_there_is_named(hub, native, tmp_path):
    assert "has no such repository" in fails("hf://acme/none")
    hub.repositories["acme/tiny"] = Repository(native)
    assert "acme/tiny has no revision v9; expected a branch, a tag or a commit" in fails("hf://acme/tiny@v9")
    hub.repositories["acme/other"] = Repository(BESIDE)
    found = fails("hf://acme/other")
    assert "hf://acme/other holds no checkpoint; expected model_NNNNNN.pt" in found
    assert "acme/other holds README.md, optim_000001_rank0.pt, pytorch_model.bin, run.py" in found
    hub.repositories["acme/half"] = Repository({"model.safetensors": native["model.safetensors"]})
    assert "has model.safetensors and no config.json" in fails("hf://acme/half")
    assert in_cache(tmp_path) == ([], [])


def test_a_server_that_cannot_be_reached_is_named(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = fails("hf://acme/tiny")
    assert "http://127.0.0.1:9 cannot be reached" in found and "HF_HUB_OFFLINE=1" in found


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("altered", "came with the SHA-256"),
        ("long", "is larger than the"),
        ("endless", "is larger than the"),
        ("cut", "cannot be reached or broke off"),
    ],
)
def test_a_file_that_comes_otherwise_than_listed_leaves_nothing(hub, native, tmp_path, monkeypatch, fault, says):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between attempts
    hub.repositories["acme/tiny"] = Repository(native, fault=fault)
    assert says in fails("hf://acme/tiny")
    offered, blobs = in_cache(tmp_path)
    assert offered == ["config.json"] and len(blobs) == 1  # came before it, and whole
    hub.repositories["acme/tiny"].fault = None
    assert open_checkpoint("hf://acme/tiny").model_file.name == "model.safetensors"


def test_weights_larger_than_their_configuration_allows_are_not_fetched(hub, native, authors):
    hub.repositories["acme/tiny"] = Repository(native, sizes={"model.safetensors": 2**40})
    assert "model.safetensors has 1099511627776 bytes, expected at most" in fails("hf://acme/tiny")
    hub.repositories["acme/pt"] = Repository(authors, sizes={"model_000000.pt": 2**30})
    assert "model_000000.pt has 1073741824 bytes, expected at most" in fails("hf://acme/pt")
    hub.repositories["acme/json"] = Repository(native, sizes={"config.json": 2**30})
    assert "config.json has 1073741824 bytes, expected at most" in fails("hf://acme/json")
    assert hub.fetched().count("config.json") == 1 and "model.safetensors" not in hub.fetched()


def test_weights_that_the_disk_has_no_room_for_are_not_fetched(hub, native, monkeypatch):
    import shutil

    hub.repositories["acme/tiny"] = Repository(native)
    full = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr("lrt_deploy.model.hub.shutil.disk_usage", lambda path: full)
    assert "and 5000 are free for" in fails("hf://acme/tiny")
    assert hub.fetched() == ["config.json"]


def test_files_in_the_cache_of_another_size_are_refused(hub, native):
    hub.repositories["acme/tiny"] = Repository(native)
    opened = open_checkpoint("hf://acme/tiny")
    blob = opened.model_file.resolve()
    blob.write_bytes(blob.read_bytes()[:-8])
    assert "in the cache has" in fails("hf://acme/tiny")


def test_names_that_leave_the_repository_or_hide_are_not_fetched(hub, native, tmp_path):
    odd = {f"../{name}": data for name, data in native.items()} | {
        f".git/{name}": data for name, data in native.items()
    }
    hub.repositories["acme/odd"] = Repository(odd | {"/etc/config.json": b"{}", "a\\b/model.safetensors": b""})
    assert "holds no checkpoint" in fails("hf://acme/odd")
    assert hub.fetched() == [] and in_cache(tmp_path) == ([], [])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf://a/b/", ("a/b", None, "")),
        ("hf://a-1/b.c@v1.0", ("a-1/b.c", "v1.0", "")),
        ("hf://a/b@refs/pr/3/base_checkpoints", ("a/b", "refs/pr/3", "base_checkpoints")),
        ("hf://a/b/c/model_000001.pt", ("a/b", None, "c/model_000001.pt")),
    ],
)
def test_names_are_read_in_parts_and_written_back(name, parts):
    found = HubName.parse(name)
    assert (found.repository, found.revision, found.inside) == parts
    assert str(found) == name.rstrip("/") and HubName.parse(str(found)) == found


@pytest.mark.parametrize(
    "name",
    ["hf://", "hf://a", "hf://a/", "hf:///b", "hf://a/b@", "hf://a/b@x y", "hf://a/b/../c", "hf://a/b//c", "hf://a/b\0",
     "hf://models/a/b", "hf://datasets/a/b", "hf://-a/b", "hf://a/b--c", "hf://a/b.", "hf://ä/b", "hf://a/b/c\\d"],
)  # fmt: skip
def test_other_names_are_refused_with_the_form_before_anything_is_asked(hub, name):
    assert "hf://" in fails(name)
    assert not hub.requests


def test_a_name_that_was_made_a_path_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="named as text and not as a Path"):
        export_bundle(Path("hf://acme/tiny"), tmp_path / "bundle")
    (tmp_path / "hf:" / "acme").mkdir(parents=True)
    assert check_source(Path("hf:/acme"), "x") == Path("hf:/acme")  # a folder of that name is one


def test_without_the_client_the_extra_is_named(tmp_path):
    script = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from lrt_deploy.cli.app import app; sys.exit(app(['inspect', 'hf://a/b'], standalone_mode=False))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "huggingface_hub" in run.stderr and "'export'" in run.stderr, run.stderr
