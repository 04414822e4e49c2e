"""A copy of a bundle's graph whose intermediate values are outputs as well, and what each of them is computed by.

The graph on disk is not touched: the copy is made in memory and reads the same weights file. Which values there are is
`lrt_deploy.activations`' business; the export gave them their names. Runs nothing: see `runtime.ort_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lrt_deploy.errors import ParityError


@dataclass(frozen=True)
class Origin:
    """How a value comes about: the ops since the stages before it, in order, and what they start from."""

    ops: tuple[str, ...]
    sources: tuple[str, ...]  # names of earlier stages, inputs and weights

    def __str__(self) -> str:
        *before, last = self.ops
        after = f" (after {', '.join(before)})" if before else ""
        return f"{last}{after} of {', '.join(self.sources)}"


@dataclass(frozen=True)
class ProbedGraph:
    """A serialized graph with extra outputs, and the folder that its weights lie in."""

    model: bytes
    folder: Path
    origins: dict[str, Origin]  # of every stage found in it


def probed(path: Path, stages: Sequence[str]) -> ProbedGraph:
    """The graph at `path` with those of `stages` that it has as outputs; ParityError if it has hardly any."""
    model = ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = [name for name in stages if name in values]
    if len(found) < len(stages) // 4:
        raise ParityError(
            f"{path} names {len(found)} of the {len(stages)} stages that bisecting compares; it was exported by a "
            "version that did not name them: export the bundle again"
        )
    outputs = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in found if name not in outputs)
    known = frozenset(found)
    origins = {name: origin_of(values[name], known) for name in found}
    return ProbedGraph(ir.to_proto(model).SerializeToString(), path.parent, origins)


def origin_of(value: ir.Value, known: frozenset[str]) -> Origin:
    """Walk back to values that are known themselves, graph inputs and initializers."""
    ops: dict[ir.Node, None] = {}
    sources: dict[str, None] = {}

    def visit(current: ir.Value) -> None:
        node = current.producer()
        if current is not value and (node is None or current.name in known):
            sources[current.name or "a constant"] = None
        elif node is not None and node not in ops:
            for source in node.inputs:
                if source is not None:
                    visit(source)
            ops[node] = None

    visit(value)
    return Origin(tuple(node.op_type for node in ops), tuple(sources))
