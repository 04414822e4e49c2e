"""Plant faults in what a bundle stores and in its graphs, and see that parity finds each and passes what is right.

Weights: each kind of matrix scaled by 1.01 and 1.25, rolled by a row, swapped with the next layer's, transposed where
it is square; gates permuted; one scale off by one code; two rows of a table swapped. The faulty matrix goes through the
exporter's own rounding, as if a checkpoint with the fault had been exported, and the part `weights` is asked.

Graphs: constants, order and wiring changed in a copy of each graph, and the part `arithmetic` is asked.

Exits with 1 if a fault was missed or the bundle without faults failed. Minutes on one core.

    python benchmarks/planted_faults.py CHECKPOINT [--markdown FILE.md]

Correct exports of many models: right_exports.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import lrt_deploy
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.manifest import Manifest, graph_path, read_manifest
from lrt_deploy.bundle.precisions import FORMATS
from lrt_deploy.bundle.weights import Floats, StoredMatrix, weight_sources
from lrt_deploy.config import LRTConfig
from lrt_deploy.evaluation.stored_weights import check_matrix, check_weights, expected_matrix
from lrt_deploy.evaluation.verdict import ArithmeticPart, activation_scale_fault, judge_arithmetic
from lrt_deploy.exporters.graph.debug_outputs import exact_graph
from lrt_deploy.exporters.quantize.qdq import quantized, weight_scales
from lrt_deploy.exporters.quantize.stored import StoredWeights
from lrt_deploy.model.checkpoint import Checkpoint, open_checkpoint
from lrt_deploy.model.reference import run_forced, take_stored_weights
from lrt_deploy.runtime.backends.ort_session import OrtDebugger
from lrt_deploy.tolerances import KernelLimits

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
KINDS = ("qkv", "attention_out", "mlp_in", "mlp_out", "memory_kv", "lm_head", "gate")
TOKENS = 48


@dataclass(frozen=True)
class Fault:
    """A change of one matrix before it is rounded; `stored` changes what was rounded instead."""

    name: str
    matrix: str
    change: Callable[[Floats], Floats] | None = None
    stored: Callable[[StoredMatrix], StoredMatrix | None] | None = None


class Weights:
    """The matrices of a bundle, and what the checkpoint says that they should be."""

    def __init__(self, bundle: Path, checkpoint: Checkpoint, precision: str) -> None:
        self.precision, self.manifest = precision, read_manifest(bundle)
        self.stored = {matrix.name: matrix for matrix in StoredWeights(bundle, self.manifest, precision)}
        sources = weight_sources(self.manifest.model)
        self.expected = {name: expected_matrix(sources[name], checkpoint.tensors) for name in self.stored}
        self.compensated = bool(self.manifest.precision_details.get(precision, {}).get("compensated"))

    def rounded(self, name: str, weight: Floats) -> StoredMatrix:
        """What an export stores for a matrix of this name."""
        before = self.stored[name]
        if before.scales is None:
            return dataclasses.replace(before, values=weight.astype(before.values.dtype))
        kind = dataclasses.replace(FORMATS[self.precision], block=before.block)
        scales = weight_scales(weight, kind)
        return dataclasses.replace(before, values=quantized(weight, scales, kind), scales=scales)

    def found(self, fault: Fault) -> bool | None:
        """Whether the part `weights` sees the fault; None where this precision cannot have it."""
        if fault.stored is not None:
            faulty = fault.stored(self.stored[fault.matrix])
            if faulty is None:
                return None
        else:
            assert fault.change is not None
            faulty = self.rounded(fault.matrix, np.ascontiguousarray(fault.change(self.expected[fault.matrix])))
            if np.array_equal(faulty.dequantized(), self.stored[fault.matrix].dequantized()):
                return None  # the fault is below half a step: what is stored is the same
        return not check_matrix(faulty, self.expected[fault.matrix], self.precision, self.compensated).passed


def faults(weights: Weights) -> Iterator[Fault]:
    """All faults that a model of this shape can have."""
    names = [name for name in weights.expected if name not in ("wte", "value_embeds")]
    for kind in KINDS:
        of_kind = [name for name in names if name == kind or name.endswith(f".{kind}")]
        if not of_kind:
            continue
        name = of_kind[len(of_kind) // 2]
        for factor in (1.01, 1.25):
            yield Fault(f"{kind} x {factor}", name, lambda w, factor=factor: w * np.float32(factor))
        yield Fault(f"{kind} rolled by a row", name, lambda w: np.roll(w, 1, axis=0))
        if len(of_kind) > 1:
            other = weights.expected[of_kind[of_kind.index(name) - 1]]
            if other.shape == weights.expected[name].shape:
                yield Fault(f"{kind} of another layer", name, lambda w, other=other: other)
        rows, columns = weights.expected[name].shape
        if rows == columns:
            yield Fault(f"{kind} transposed", name, lambda w: w.T)
        if kind == "gate":
            yield Fault("gates permuted", name, lambda w: np.roll(w, w.shape[1] // 3, axis=1))
        yield Fault(f"{kind}: two rows swapped", name, _swap_first_rows)
        yield Fault(f"{kind}: a scale off by one code", name, stored=_next_scale)
        yield Fault(f"{kind}: an integer off by one", name, stored=_next_integer)
    for table in ("wte", "value_embeds"):
        if table in weights.expected:
            yield Fault(f"{table}: two rows swapped", table, _swap_first_rows)
            yield Fault(f"{table} x 1.01", table, lambda w: w * np.float32(1.01))


def _swap_first_rows(weight: Floats) -> Floats:
    result = weight.copy()
    result[[1, 2]] = weight[[2, 1]]
    return result


def _next_scale(matrix: StoredMatrix) -> StoredMatrix | None:
    """One scale, in the middle, is the next float16 number."""
    if matrix.scales is None:
        return None
    scales = matrix.scales.copy()
    at = np.unravel_index(scales.size // 2, scales.shape)
    scales[at] = np.nextafter(scales[at], np.float16(np.inf))
    return dataclasses.replace(matrix, scales=scales)


def _next_integer(matrix: StoredMatrix) -> StoredMatrix | None:
    """One integer, in the middle, is one nearer to zero, or one from it."""
    if matrix.scales is None:
        return None
    values = matrix.values.astype(np.int8)
    at = tuple(size // 2 for size in values.shape)
    values[at] += -1 if values[at] > 0 else 1
    return dataclasses.replace(matrix, values=values)


Edit = Callable[[ir.Model], bool]  # whether the graph has what is changed


def graph_faults(config: LRTConfig) -> dict[str, Edit]:
    """Changes of a graph that leave its stored weights alone."""
    return {
        "softcap of 14.85 for 15": lambda model: _constant(model, "Tanh", 0.99),
        "a residual factor x 1.01": _residual,
        "a window one too narrow": _window,
        "two layers' MLP matrices swapped": _wiring,
        "rotation the other way round": _rotation,
        "norm with another eps": _eps,
        "int8 step of one activation x 1.25": _activation_scale,
    }


def _constant(model: ir.Model, after: str, factor: float) -> bool:
    """Scale the constant of the first Mul that reads the result of an op."""
    for node in model.graph:
        if node.op_type != "Mul":
            continue
        ops = [value.producer().op_type for value in node.inputs if value is not None and value.producer() is not None]
        constants = [value for value in node.inputs if value is not None and value.const_value is not None]
        if after in ops and constants:
            return _scale(constants[0], factor)
    return False


def _residual(model: ir.Model) -> bool:
    """The first constant of the residual stream, whatever the flavour calls it."""
    names = [name for name in model.graph.initializers if name.startswith("mix_") and name.endswith("factors")]
    names += [name for name in model.graph.initializers if name.startswith("select")]
    return bool(names) and _scale(model.graph.initializers[names[0]], 1.01)


def _scale(value: ir.Value, factor: float) -> bool:
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)
    return True


def _window(model: ir.Model) -> bool:
    name = next((name for name in model.graph.initializers if name.startswith("window_")), None)
    if name is None:
        return False
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() - 1, name=name)
    return True


def _wiring(model: ir.Model) -> bool:
    """What reads blocks.0.mlp_in reads blocks.1.mlp_in, and the other way round, with their scales."""
    first, second = (_products(model, f"blocks.{layer}.mlp_in") for layer in (0, 1))
    if not first or not second:
        return False
    one, other = first[0].inputs[1], second[0].inputs[1]
    first[0].replace_input_with(1, other)
    second[0].replace_input_with(1, one)
    model.graph.sort()
    return True


def _products(model: ir.Model, name: str) -> list[ir.Node]:
    from lrt_deploy.exporters.graph.rewrite import matrix_name

    return [node for node in model.graph if node.op_type == "MatMul" and matrix_name(node) == name]


def _rotation(model: ir.Model) -> bool:
    value = model.graph.initializers["sin"]
    assert value.const_value is not None
    value.const_value = ir.tensor(-value.const_value.numpy(), name="sin")
    return True


def _eps(model: ir.Model) -> bool:
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    return True


def _activation_scale(model: ir.Model) -> bool:
    node = next((node for node in model.graph if node.op_type == "QuantizeLinear"), None)
    if node is None:
        return False
    value = node.inputs[1]
    while value is not None and value.const_value is None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    return value is not None and _scale(value, 1.25)


class Graphs:
    """One precision's graph on the CPU, against PyTorch on the stored weights over some tokens and latents."""

    def __init__(self, bundle: Path, checkpoint: Checkpoint, precision: str, flavour: Flavour = "windowed") -> None:
        self.bundle, self.precision, self.manifest = bundle, precision, read_manifest(bundle)
        self.path = bundle / graph_path(precision, "prefill", flavour)
        self.config: LRTConfig = self.manifest.model
        self.model = checkpoint.model(self.manifest.max_seq_len)
        take_stored_weights(self.model, StoredWeights(bundle, self.manifest, precision))
        rng = np.random.default_rng(0)
        # A window is seen by what is longer than it.
        count = min(max(TOKENS, min(self.config.windows) + 16), self.manifest.max_seq_len)
        self.tokens = rng.integers(0, self.config.vocab_size, count).tolist()
        latents = rng.normal(size=(count, self.config.n_embd)).astype(np.float32)
        self.latents = latents / np.sqrt((latents**2).mean(axis=1, keepdims=True))
        self.expected = run_forced(self.model, self.tokens, self.latents)

    def part(self, edit: Edit | None, folder: Path) -> ArithmeticPart | None:
        """The part `arithmetic` with the graph changed; None where it has nothing to change."""
        path = self.path
        if edit is not None:
            model = ir.load(path)
            if not edit(model):
                return None
            path = folder / self.path.name
            ir.save(model, path)
        exact = exact_graph(path, self.config)
        found = OrtDebugger(exact.model, self.path.parent, self.config, fused=False).run(self.tokens, self.latents)
        stated: Mapping[str, float] = self.manifest.precision_details.get(self.precision, {}).get(
            "activation_scales", {}
        )
        fault = activation_scale_fault(exact.activation_scales, stated)
        pair, unlimited = (found, self.expected), KernelLimits(math.inf, math.inf, math.inf)  # no kernels ran
        return judge_arithmetic(pair, pair, unlimited, fault)


def rows_of(bundle: Path, checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Fault -> precision -> found, missed, or - where there is no such fault."""
    table: dict[str, dict[str, str]] = {}
    words = {True: "found", False: "MISSED", None: "-"}
    with tempfile.TemporaryDirectory() as folder:
        for precision in read_manifest(bundle).precisions:
            weights = Weights(bundle, checkpoint, precision)
            for fault in faults(weights):
                table.setdefault(fault.name, {})[precision] = words[weights.found(fault)]
            graphs = Graphs(bundle, checkpoint, precision)
            for name, edit in graph_faults(graphs.config).items():
                part = graphs.part(edit, Path(folder))
                table.setdefault(f"graph: {name}", {})[precision] = words[None if part is None else not part.passed]
    return table


def right(bundle: Path, manifest: Manifest, source: Path, folder: Path) -> list[str]:
    """What fails of a bundle in which all is right, in words."""
    checkpoint, failed = open_checkpoint(source), []
    for precision in manifest.precisions:
        compensated = bool(manifest.precision_details.get(precision, {}).get("compensated"))
        stored = StoredWeights(bundle, manifest, precision)
        part = check_weights(stored, checkpoint.tensors, manifest.model, precision, compensated)
        arithmetic = Graphs(bundle, checkpoint, precision).part(None, folder)
        assert arithmetic is not None
        failed += [f"{precision}: {one.line}" for one in (part, arithmetic) if not one.passed]
    return failed


def markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    """The table, a fault a row."""
    precisions = list(dict.fromkeys(precision for row in table.values() for precision in row))
    lines = [f"| planted fault | {' | '.join(precisions)} |", "| --- |" + " --- |" * len(precisions)]
    lines += [f"| {name} | {' | '.join(row.get(p, '-') for p in precisions)} |" for name, row in table.items()]
    return "\n".join(lines)


def main() -> None:
    """Export, plant, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = lrt_deploy.export_bundle(args.checkpoint, folder / "planted", precision=PRECISIONS)
        failed = right(folder / "planted", manifest, args.checkpoint, folder)
        table = rows_of(folder / "planted", open_checkpoint(args.checkpoint))
    text = markdown(table)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    cells = [word for row in table.values() for word in row.values()]
    print(f"\n{cells.count('found')} faults found, {cells.count('MISSED')} missed; {len(failed)} right ones failed")
    for line in failed:
        print(line)
    if failed or "MISSED" in cells:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
