"""Trace the reference model into one ONNX graph with explicit state: prefill, free in B, T, S and K.

The two cache operations get their ONNX spelling, inputs and outputs the names of `contract`, and the head runs for the
chosen positions alone. The result is the `full` flavour straight from torch; `passes` cleans it and derives the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lrt_deploy.bundle.contract import OPSET, graph_inputs, graph_outputs
from lrt_deploy.bundle.weights import matrix_shapes
from lrt_deploy.errors import ExportError
from lrt_deploy.model.model import LRT, CacheOps

from .passes import ACTIVATION_DOMAIN

# Sizes at trace time; any that differ from each other and from 0 and 1 keep the dimensions symbolic.
_SIZES = {"batch": 2, "tokens": 3, "capacity": 16, "rows": 5}
_MERGED_ELEMENTS = 2**16  # torch's optimizer looks at 1,024
_CACHE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_PREFIX = "model."  # what ExplicitState puts before every parameter name


class OnnxCacheOps(CacheOps):
    """The cache operations as the opset-24 ops that ORT and TensorRT run in place."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate by RotaryEmbedding, with the sine negated: ONNX has y1 = x1 cos - x2 sin, the authors +."""
        return torch.onnx.ops.rotary_embedding(x, cos, sin, position_ids)

    def write(self, past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
        """Write by TensorScatter: the cache is a graph input, and its output may share the input's buffer."""
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            [past, update, write_index],
            {"axis": -2, "mode": "linear"},
            dtype=past.dtype,
            shape=past.shape,
            version=OPSET,
        )

    def mark(self, x: Tensor, stage: str) -> Tensor:
        """A node that does nothing but carry the name to `passes.name_activations`, which removes it."""
        return torch.onnx.ops.symbolic(
            f"{ACTIVATION_DOMAIN}::Stage", [x], {"stage": stage}, dtype=x.dtype, shape=x.shape, version=1
        )


class ExplicitState(nn.Module):
    """`LRT.forward` with the head on chosen positions, its arguments in the order of the contract."""

    def __init__(self, model: LRT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        last_index: Tensor,
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Return logits (B, K, V) and the present state, in the order of `contract.graph_outputs`."""
        layers, memory = self.model.config.n_layer, self.model.config.memory
        latent = state[0] if memory else None
        keys, values = state[-2 * layers : -layers], state[-layers:]
        step = self.model(input_ids, position_ids, latent, keys, values, write_index)
        index = last_index.unsqueeze(-1).expand(-1, -1, step.hidden.shape[-1])  # (B, K, C)
        logits = self.model.logits(step.hidden.gather(1, index))  # (B, K, V)
        return (logits, *([step.latent] if memory else []), *step.keys, *step.values)


def trace(model: LRT) -> ir.Model:
    """Trace `model`, whose weights become initializers of the same names; ExportError with the tracer's own message."""
    config = model.config
    inputs, outputs = graph_inputs(config, "full"), graph_outputs(config)
    dims = {name: torch.export.Dim(name) for name in _SIZES}  # one for each name, so that every cache shares `capacity`
    free = [{i: dims[dim] for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs]
    example = [
        torch.zeros(
            [_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in inputs
    ]
    with _quiet(), _no_cache_folder(), torch.no_grad(), _prepared(model):
        try:
            program = torch.onnx.export(
                ExplicitState(model).eval(),
                (*example[:4], tuple(example[4:])),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(*free[:4], tuple(free[4:])),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError(f"tracing the model failed in torch {torch.__version__}: {cause}") from error
    if program is None:
        raise ExportError(f"torch {torch.__version__} returned no program from torch.onnx.export")
    for name, value in list(program.model.graph.initializers.items()):
        value.name = name.removeprefix(_PREFIX)
    if shared := matrix_shapes(config).keys() - program.model.graph.initializers.keys():
        raise ExportError(
            f"torch {torch.__version__} traced a graph that lacks the matrices {', '.join(sorted(shared))}; install "
            "the versions of constraints.txt"
        )
    return program.model


@contextlib.contextmanager
def _prepared(model: LRT) -> Iterator[None]:
    """Give the model ONNX's cache ops and sense of rotation, and other contents to small matrices, for the trace.

    torch's optimizer lets all small initializers of equal contents be one. In a fresh checkpoint the gates of all
    layers are zeros, and a pass that stores one layer's matrix in another form would change it for all of them.
    """
    small = [p.data for p in model.parameters() if p.ndim > 1 and p.numel() <= _MERGED_ELEMENTS]
    kept, ops = [data.clone() for data in small], model.ops
    model.ops = OnnxCacheOps()
    model.sin.neg_()
    for number, data in enumerate(small):
        data.fill_(number + 2)
    try:
        yield
    finally:
        model.ops = ops
        model.sin = -model.sin  # a new tensor: the traced graph keeps the negated one
        for data, content in zip(small, kept, strict=True):
            data.copy_(content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's log and warnings; a failure is raised, as one error.

    The exporter gives advice on ops that it does not know and on its own deprecations. Its tracer logs the traceback of
    every exception that passes through, an interrupt's included.
    """
    levels = {"torch.onnx": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _no_cache_folder() -> Iterator[None]:
    """Give torch's tracer, which makes a folder for compiled kernels and compiles none, a temporary one."""
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.setdefault(_CACHE_FOLDER, folder)
        try:
            yield
        finally:
            if given == folder:
                del os.environ[_CACHE_FOLDER]
