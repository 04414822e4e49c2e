"""ONNX Runtime sessions: hold an opened one against the contract, and turn what it raises into our errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from onnxruntime.capi import onnxruntime_pybind11_state as _native

from lrt_deploy.bundle import contract
from lrt_deploy.bundle.contract import Flavour, TensorSpec
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.bundle.precisions import base_dtype
from lrt_deploy.config import LRTConfig
from lrt_deploy.errors import BackendError, BundleError, ConfigError
from lrt_deploy.fields import shown
from lrt_deploy.files import parse_json

# RuntimeError is what its bindings make of C++ exceptions that have no type of their own, ValueError and IndexError of
# two of the standard library's. UnicodeDecodeError: a message that quotes a damaged graph and is no text.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(RuntimeError, ValueError, IndexError, UnicodeDecodeError),
    *(found for found in vars(_native).values() if isinstance(found, type) and issubclass(found, Exception)),
)


def raise_backend_error(error: Exception, what: str) -> NoReturn:
    """Raise BackendError, which begins with `what`, for an error that `ORT_ERRORS` has caught.

    An error whose type is the caller's own, derived from one of these, is raised as it is.
    """
    if type(error) not in ORT_ERRORS:
        raise error
    raise BackendError(f"{what}: {error}") from error


# Names of types by those of ONNX Runtime.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}


def check_session(session: Any, graph: Path, manifest: Manifest, precision: str, flavour: Flavour) -> None:  # noqa: ANN401
    """Raise BundleError unless the session's graph is the prefill graph of this model, precision and flavour."""
    base = base_dtype(precision, flavour)
    try:
        faults = [
            *_tensor_faults(
                "input",
                session.get_inputs(),
                contract.graph_inputs(manifest.model, flavour, base, manifest.host_embeddings),
            ),
            *_tensor_faults("output", session.get_outputs(), contract.graph_outputs(manifest.model, base)),
            *_metadata_faults(session.get_modelmeta().custom_metadata_map, manifest.model, precision),
        ]
    except UnicodeDecodeError as error:
        faults = [f"its names or metadata are not UTF-8 ({error.reason} at byte {error.start})"]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BundleError(
            f"{graph} is not the {flavour} graph in {precision} of the model that the manifest describes: "
            f"{faults[0]}{more}; export the bundle again"
        )


def _tensor_faults(way: str, found: Sequence[Any], expected: Sequence[TensorSpec]) -> Iterator[str]:
    known = {value.name: (DTYPES.get(value.type, value.type), tuple(value.shape)) for value in found}
    for spec in expected:
        if spec.name not in known:
            yield f"it has no {way} {spec.name}"
        elif (tensor := known[spec.name]) != (spec.dtype, spec.shape):
            yield f"its {way} {spec.name} is {_described(*tensor)}, expected {_described(spec.dtype, spec.shape)}"
    if strays := known.keys() - {spec.name for spec in expected}:
        yield f"it has the {way} {shown(min(strays))}, which the contract does not know"


def _metadata_faults(metadata: dict[str, str], model: LRTConfig, precision: str) -> Iterator[str]:
    if (found := metadata.get("lrt_deploy.precision")) != precision:
        yield f"its metadata say that the precision is {shown(found)}"
    try:
        fields = parse_json(metadata.get("lrt_deploy.model", "null"), "the model in its metadata", BundleError)
        same = LRTConfig.from_dict(fields) == model
    except (BundleError, ConfigError) as error:
        yield f"its metadata do not say what model it is of: {error}"
        return
    if not same:
        yield "its metadata describe another model"


def _described(dtype: str, shape: Sequence[object]) -> str:
    return f"{dtype} ({', '.join(map(str, shape))})"
