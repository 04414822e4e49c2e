"""Bundles whose embedding tables stay on the host: the same numbers to the bit, and graphs that hold no table."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import lrt_deploy
from lrt_deploy import activations
from lrt_deploy.activations import StepInput
from lrt_deploy.bundle import contract
from lrt_deploy.bundle.manifest import (
    MANIFEST,
    PHASES,
    TABLES,
    WEIGHTS,
    graph_path,
    read_manifest,
    table_path,
    write_manifest,
)
from lrt_deploy.bundle.precisions import PRECISIONS
from lrt_deploy.cli.app import app
from lrt_deploy.errors import BundleError, ExportError, InputError
from lrt_deploy.exporters.graph.debug_outputs import with_debug_outputs
from lrt_deploy.exporters.graph.precision_graphs import take_out_tables
from lrt_deploy.runtime.backends.host_tables import HostTables, RowArrays
from lrt_deploy.runtime.backends.ort_session import OrtDebugger
from lrt_deploy.runtime.batch import BatchDecoder

pytestmark = pytest.mark.slow  # for the exports

NAME, PLAIN = "mr_gqa_SSSL", "baseline_ve"
ON_CPU = [precision for precision in PRECISIONS if precision != "bf16"]
PROMPTS = [[5, 9, 2, 77, 31, 200, 4, 18, 6, 42, 42, 7, 3, 1, 250, 99, 8], [11, 12, 13]]


@pytest.fixture(scope="module")
def on_host(host_embeddings_once):
    return host_embeddings_once(NAME, PRECISIONS)


@pytest.fixture
def copied(on_host, tmp_path):
    return shutil.copytree(on_host, tmp_path / "bundle")


def numbers(folder, policy="stepwise", precision=None):
    """Logits and latents of a prompt and some steps."""
    with lrt_deploy.open_decoder(folder, precision=precision) as decoder:
        known = decoder.config.vocab_size
        state = decoder.prefill([[token % known for token in prompt] for prompt in PROMPTS], policy=policy)
        found = [state.logits]
        for step in range(6):
            found.append(decoder.step(state, [step, (300 - step) % known]))
            found += [] if state.latent is None else [state.latent]
        return found


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# The same numbers


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("policy", ["stepwise", "fixed-point", "zero"])
def test_every_bit_is_the_same_in_every_precision_and_prefill(on_host, in_every_precision, policy, precision):
    assert equal(numbers(on_host, policy, precision), numbers(in_every_precision(NAME), policy, precision))


@pytest.mark.parametrize("name", [PLAIN, "padded_vocab"])
def test_other_models_too(host_embeddings_once, export_once, name):
    assert equal(numbers(host_embeddings_once(name)), numbers(export_once(name)))


@pytest.mark.parametrize("table", [contract.TOKEN_EMBEDS, contract.VALUE_EMBEDS])
def test_a_wrong_row_would_show(copied, on_host, table):
    """The twin: one number of the last row that is read."""
    record = read_manifest(copied).tables["fp32"][table]
    with (copied / table_path("fp32")).open("r+b") as file:
        file.seek(record.offset + 4 * record.shape[1] * 300)
        file.write(np.float32(3).tobytes())
    write_manifest(copied, read_manifest(copied))
    assert not equal(numbers(copied, precision="fp32"), numbers(on_host, precision="fp32"))


def test_a_batch_gives_the_same_tokens(on_host, in_every_precision):
    found = []
    for folder in (on_host, in_every_precision(NAME)):
        with lrt_deploy.open_decoder(folder) as decoder, BatchDecoder(decoder, 2) as batch:
            for prompt in (*PROMPTS, PROMPTS[0][3:]):
                batch.submit(prompt, 8, stop_ids=[])
            found.append([(event.request, event.event) for event in batch.run()])
    assert len(found[0]) >= 3 * 8 and repr(found[0]) == repr(found[1])


def test_ids_outside_of_the_vocabulary_never_reach_a_table(on_host):
    with lrt_deploy.open_decoder(on_host) as decoder:
        state = decoder.prefill([[1]])
        for token in (-1, decoder.config.vocab_size):
            with pytest.raises(InputError):
                decoder.step(state, [token])
            with pytest.raises(InputError):
                decoder.prefill([[token]])


def test_parity_passes_against_the_checkpoint(on_host, golden_of):
    args = ["parity", str(on_host), "--checkpoint", str(golden_of(NAME).folder), "--precision", "fp32", "--json"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["passed"]


@pytest.mark.parametrize("flavour", contract.FLAVOURS)
def test_probes_see_the_same_stages(on_host, in_every_precision, flavour):
    seen = []
    for folder in (on_host, in_every_precision(NAME)):
        manifest = read_manifest(folder)
        graph = with_debug_outputs(
            folder / graph_path("fp32", "prefill", flavour), activations.in_order(manifest.model)
        )
        tables = HostTables.open(folder, manifest, "fp32")
        probe = OrtDebugger(graph.model, graph.folder, manifest.model, tables)
        with lrt_deploy.open_decoder(folder, precision="fp32") as decoder:
            step = StepInput.after(decoder.prefill(PROMPTS[:1], policy="stepwise"), 7, manifest.model)
        seen.append(probe.observe(step))
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 20
    assert equal(seen[0].values(), seen[1].values())


# What is in the bundle


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_graph_holds_a_table_and_every_graph_has_the_inputs_of_its_contract(on_host, precision):
    manifest = read_manifest(on_host)
    rows = manifest.model.padded_vocab_size
    for flavour in contract.FLAVOURS:
        described = manifest.contracts[precision][flavour]
        names = [spec["name"] for spec in described["inputs"]]
        assert names[0] == contract.TOKEN_EMBEDS and names[-1] == contract.VALUE_EMBEDS and "input_ids" not in names
        for phase in PHASES:
            model = onnx.load(on_host / graph_path(precision, phase, flavour), load_external_data=False)
            assert [value.name for value in model.graph.input] == names
            assert json.loads({p.key: p.value for p in model.metadata_props}["lrt_deploy.contract"]) == described
            assert not any(len(tensor.dims) == 2 and tensor.dims[0] == rows for tensor in model.graph.initializer)


def test_weights_and_tables_are_what_the_weights_file_was(on_host, in_every_precision):
    sizes, whole = read_manifest(on_host).files, read_manifest(in_every_precision(NAME)).files
    for precision in PRECISIONS:
        weights, tables = sizes[f"graphs/{precision}/{WEIGHTS}"].bytes, sizes[f"graphs/{precision}/{TABLES}"].bytes
        rest = whole[f"graphs/{precision}/{WEIGHTS}"].bytes - weights - tables
        assert abs(rest) <= 2 * 4096 and tables > 0  # tensors begin on pages


def test_a_bundle_without_them_says_nothing_of_tables(export_once):
    assert "tables" not in json.loads((export_once(NAME) / MANIFEST).read_text())
    assert not read_manifest(export_once(NAME)).host_embeddings


def test_inspect_says_where_the_tables_are(on_host, export_once):
    shown = [CliRunner().invoke(app, ["inspect", str(folder)]).stderr for folder in (on_host, export_once(NAME))]
    assert "on the host" in shown[0] and "on the host" not in shown[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [319, 64]}, "tables of fp32 are"),
        ({"shape": [320, 0]}, r"token_embeds\.shape\[1\] is 0, expected a whole number >= 1"),
        ({"shape": [320, 64, 1]}, r"tables\.fp32\.token_embeds\.shape is .*, expected an array of length 2"),
        ({"shape": [320, True]}, r"tables\.fp32\.token_embeds\.shape\[1\] is True, expected a whole number"),
        ({"dtype": "float64"}, r"token_embeds\.dtype is 'float64', expected one of"),
        ({"dtype": ["float32"]}, r"token_embeds\.dtype is \['float32'\], expected text"),
        ({"dtype": "float16"}, "begins at byte"),  # half as long: a gap follows
        ({"offset": -4096}, "token_embeds.offset is -4096, expected a whole number >= 0"),
        ({"offset": 2}, "token_embeds begins at byte 2 "),
        ({"offset": 4096}, "begins at byte"),  # over the next one
        ({"offset": 10**9}, "begins at byte"),
        ({"offset": 1.0}, "token_embeds.offset is 1.0, expected a whole number"),
        ({"size": 4}, "token_embeds.size is not a known field"),
    ],
)
def test_tables_that_cannot_be_are_refused(copied, change, message):
    fields = json.loads((copied / MANIFEST).read_text())
    fields["tables"]["fp32"][contract.TOKEN_EMBEDS] |= change
    text = json.dumps(fields).encode()
    (copied / MANIFEST).write_bytes(text)
    (copied / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    with pytest.raises(BundleError, match=message):
        read_manifest(copied)


def test_a_table_that_was_altered_is_refused(copied):
    path = copied / table_path("fp32")
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(BundleError, match=r"tables.bin does not match its hash"):
        lrt_deploy.open_decoder(copied)


def test_a_graph_without_the_tables_is_refused(on_host, tmp_path):
    model = ir.load(on_host / graph_path("fp32", "prefill", "full"))
    with pytest.raises(ExportError, match="the graph gathers"):
        take_out_tables(model, read_manifest(on_host).model, tmp_path / TABLES, lambda done, total: None)


def test_rows_of_calls_share_memory_that_grows():
    tables = HostTables({"a": np.arange(20, dtype=np.float16).reshape(10, 2)})
    arrays = RowArrays(tables)
    large, small = arrays.of(1, 4), arrays.of(1, 2)
    assert np.shares_memory(large["a"], small["a"])
    tables.take(np.array([[9, 0]]), small)
    assert small["a"].tolist() == [[[18, 19], [0, 1]]] and small["a"].dtype == np.float32
    assert not np.shares_memory(arrays.of(2, 4)["a"], large["a"])
