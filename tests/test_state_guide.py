"""The code of docs/state.md runs as it stands, with the names that its text gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lrt_deploy

TEXT = (Path(__file__).parents[1] / "docs" / "state.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow  # for the export


@pytest.fixture
def decoder(export_once):
    with lrt_deploy.open_decoder(export_once("mr_gqa_SSSL")) as opened:
        yield opened


def test_the_document_has_the_code_that_is_run_here():
    assert len(CODE) == 2


def test_the_code_on_states_runs(decoder, export_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lrt_deploy.open_decoder(export_once("mr_gqa_SSSL")) as other:
        names = {"decoder": decoder, "other_decoder": other}
        exec(CODE[0], names)  # noqa: S102 - the document's own code
        assert names["twin"].lengths.tolist() == [3, 2]
        assert names["some"].lengths.tolist() == [2, 3, 3]
        assert len(other.step(names["moved"], [1, 1])) == 2
        assert list(names["state"].tokens[0]) == [1, 2, 9]
        assert names["state"].prefill.reused_tokens == 2
        assert names["batch"].batch == 0


def test_the_code_on_batches_runs(decoder):
    names = {"decoder": decoder, "prompts": [[1, 2, 3], [4, 5], [6]], "prompt": [1, 2, 3], "tokens": [1, 2, 3, 4]}
    names["state"] = decoder.prefill([[1, 2, 9]])
    exec(CODE[1], names)  # noqa: S102 - the document's own code
    batch = names["batch"]
    batch.resume(names["number"])
    ended = {found.request: found for found in batch.run()}
    assert all(found.error is None for found in ended.values())
    assert {names["first"], names["second"], names["number"]} <= set(ended)
