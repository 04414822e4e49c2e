"""Write the four graphs and the weights file of one precision, from the one traced graph and a plan.

The order matters: weights are stored (cast, quantized) in a float32 graph, which is written once; both
flavours are then derived from it, each in its own base type, and so share every number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir

from lrt_deploy.bundle import contract, manifest
from lrt_deploy.bundle.contract import Flavour
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.exporters.quantize.plan import Plan
from lrt_deploy.exporters.quantize.qdq import quantize, round_by_gptq, unpad

from . import passes, variants, verify, weights_file
from .cast import cast_model, cast_weights

Progress = Callable[[str, int, int], None]


def write_precision(
    traced: ir.Model, config: LRTConfig, capacity: int, plan: Plan, folder: Path, say: Progress
) -> tuple[dict[str, verify.Counts], dict[str, manifest.TableRecord]]:
    """Write graphs and weights below `folder`; return the counts of each flavour's graphs, and tables in a file."""
    out = folder / "graphs" / plan.precision
    out.mkdir(parents=True)
    stored = store_weights(traced, plan)
    tables: dict[str, manifest.TableRecord] = {}
    if plan.host_embeddings:
        report = partial(say, f"writing {plan.precision} tables")
        tables = weights_file.take_out_tables(stored, config, out / manifest.TABLES, report)
    weights_file.externalize(stored, out / manifest.WEIGHTS, partial(say, f"writing {plan.precision} weights"))
    operations: dict[str, verify.Counts] = {}
    for flavour in contract.FLAVOURS:
        derived = derive(stored, config, capacity, plan, flavour)
        base = base_dtype(plan.precision, flavour)
        expected = verify.expected_counts(config, plan.kind, base, len(plan.keep), len(plan.float32))
        operations[flavour] = verify.check(derived.graph, expected, f"the {flavour} graph in {plan.precision}")
        for phase, make in (("prefill", ir.Model.clone), ("decode_step", variants.decode_step)):
            final = make(derived)
            variants.describe(final, config, flavour, plan.precision)
            ir.save(final, folder / manifest.graph_path(plan.precision, phase, flavour))
    return operations, tables


def store_weights(traced: ir.Model, plan: Plan) -> ir.Model:
    """Return a copy of the traced graph that computes in float32 on weights as the precision stores them."""
    model = traced.clone()
    if plan.kind is not None:
        stored = {
            name: round_by_gptq(value.const_value.numpy(), plan.moments[name], plan.kind)
            for name, value in model.graph.initializers.items()
            if name in plan.moments and value.const_value is not None
        }
        quantize(model, plan.kind, plan.keep, plan.activation_scales, stored)
    if plan.precision != "fp32":
        cast_weights(model, base_dtype(plan.precision, "full"), plan.float32)
    return model


def derive(stored: ir.Model, config: LRTConfig, capacity: int, plan: Plan, flavour: Flavour) -> ir.Model:
    """Return the flavour's prefill graph in its base type."""
    model = cast_model(stored, base_dtype(plan.precision, flavour), plan.float32)
    if flavour == "windowed":
        unpad(model)
        model = variants.windowed(model, config, capacity)
    passes.check_ops(model.graph)
    return model
