"""Any JSON value in any field of the files that hold JSON is refused by name, or read as what it says."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import trial
from hostile.kinds import bundles, configs, native, small_files, states
from hostile.kinds.checkpoints import META, MODEL
from hostile.originals import Originals
from hostile.trial import Trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by Linux's own means")
few = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))


@pytest.fixture(scope="module")
def originals(originals_folder):
    return Originals(originals_folder)


@pytest.fixture
def new_place(tmp_path):
    """A function that makes an empty folder, one for each example."""
    count = iter(range(10_000))

    def make():
        (place := tmp_path / str(next(count))).mkdir()
        return place

    return make


def fine(act, place, *names: str) -> None:
    result = trial.run(Trial("", True, act, names), place, ())
    assert result.verdict in trial.FINE, f"{result.verdict}: {result.detail}"


def with_value(data, fields: dict, value: object) -> dict:
    """The fields with one, drawn by `data`, of another value."""
    key = data.draw(st.sampled_from(sorted(fields)), "field")
    return fields | {key: value}


@few
@given(data=st.data(), value=VALUES)
def test_a_model_config(data, value, originals, new_place):
    (folder := new_place() / "checkpoint").mkdir()
    (folder / MODEL).symlink_to(originals.folder / "lrt" / MODEL)
    meta = json.loads(originals.bytes_of(f"lrt/{META}"))
    meta["model_config"] = with_value(data, meta["model_config"], value)
    (folder / META).write_text(text := json.dumps(meta))
    fine(lambda: configs.opened(folder, "lrt", text.encode(), originals, False), folder.parent, META, MODEL)


@few
@given(data=st.data(), value=VALUES)
def test_an_entry_of_a_safetensors_header(data, value, originals, new_place):
    (folder := new_place() / "checkpoint").mkdir()
    (folder / "config.json").symlink_to(originals.folder / "native" / "config.json")
    content = originals.bytes_of("native/model.safetensors")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(header)), "tensor")
    header[key] = with_value(data, header[key], value) if isinstance(header[key], dict) else value
    content = native.joined(json.dumps(header).encode(), content[8 + length :])
    (folder / "model.safetensors").write_bytes(content)
    fine(lambda: native.opened_native(folder, content, originals, False), folder.parent, "model.safetensors")


@few
@given(data=st.data(), value=VALUES)
def test_a_manifest_with_fitting_hashes(data, value, originals, new_place):
    place = new_place()
    bundle = bundles.linked(originals.folder / "hosted", place / "bundle")
    fields = json.loads(originals.bytes_of("hosted/manifest.json"))
    part = data.draw(st.sampled_from(["all", "model", "provenance", "precision_details", "tables", "files"]), "part")
    changed = fields if part == "all" else fields[part]
    changed.update(with_value(data, changed, value))
    bundles.seal(bundle, json.dumps(fields))
    fine(lambda: bundles.opened(bundle, "hosted", originals, False, None, False), place, *bundles.NAMES)


@few
@given(data=st.data(), value=VALUES)
def test_a_sidecar_of_an_engine(data, value, originals, new_place):
    (folder := new_place() / "engine").mkdir()
    (folder / "lrt.plan").symlink_to(originals.folder / "engine" / "lrt.plan")
    original = json.loads(originals.bytes_of("engine/lrt.plan.json"))
    (folder / "lrt.plan.json").write_text(text := json.dumps(with_value(data, original, value)))
    act = lambda: small_files.engine(folder / "lrt.plan", text.encode(), original, False)  # noqa: E731
    fine(act, folder.parent, "lrt.plan", "engine")


@few
@given(data=st.data(), value=VALUES)
def test_the_book_of_a_state_with_a_fitting_checksum(data, value, originals, new_place):
    header, metadata, body = states.take_apart(originals.bytes_of("one.state"))
    book = json.loads(metadata["book"])
    metadata["book"] = json.dumps(with_value(data, book, value))
    (path := new_place() / "chat.state").write_bytes(content := states.sealed(header, metadata, body))
    fine(lambda: states.loaded(path, "one.state", content, True, originals), path.parent, "chat.state")
