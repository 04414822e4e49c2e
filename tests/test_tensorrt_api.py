"""Every call that our code makes of TensorRT exists, with those arguments, in TensorRT-RTX and in full TensorRT.

TensorRT-RTX is installed and can be asked. Full TensorRT cannot be loaded here, but its bindings can be read as a file:
`data/tensorrt_api/tensorrt.json` is what `read_symbols.py` beside it found in the wheel of TensorRT 11. The table below
is complete: any name of TensorRT's API that the code uses and the table lacks fails a test. So does, for CUDA, any call
with a number of arguments that `cuda.bindings` does not take.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheels for this platform")

ROOT = Path(__file__).parents[1]
WHEEL = json.loads((Path(__file__).parent / "data" / "tensorrt_api" / "tensorrt.json").read_text())
FILES = (
    "exporters/engine/build.py",
    "exporters/engine/tensorrt.py",
    "exporters/engine/verify.py",
    "runtime/backends/tensorrt.py",
    "lrt_deploy/bundle/tensorrt_libraries.py",
)

# Arguments by class and method, None for an attribute or a member of an enumeration.
CALLS = {
    "Builder.create_network": ["flags"],
    "BuilderFlag": None,
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "IBuilderConfig.get_flag": ["flag"],
    "IBuilderConfig.get_timing_cache": [],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IConstantLayer.weights": None,
    "ICudaEngine.create_execution_context": ["runtime_config"],
    "ICudaEngine.create_runtime_config": [],
    "ICudaEngine.device_memory_size_v2": None,
    "ICudaEngine.get_aliased_input_tensor": ["name"],
    "ICudaEngine.get_tensor_dtype": ["name"],
    "ICudaEngine.get_tensor_name": ["index"],
    "ICudaEngine.get_tensor_profile_shape": ["name", "profile_index"],
    "ICudaEngine.get_tensor_shape": ["name"],
    "ICudaEngine.num_io_tensors": None,
    "ICudaEngine.num_optimization_profiles": None,
    "ExecutionContextAllocationStrategy.USER_MANAGED": None,
    "IExecutionContext.execute_async_v3": ["stream_handle"],
    "IExecutionContext.infer_shapes": [],
    "IExecutionContext.set_device_memory": ["memory", "size"],
    "IExecutionContext.set_input_shape": ["name", "shape"],
    "IExecutionContext.set_optimization_profile_async": ["profile_index", "stream_handle"],
    "IExecutionContext.set_tensor_address": ["name", "memory"],
    "ILayer.get_input": ["index"],
    "ILayer.get_output": ["index"],
    "ILayer.name": None,
    "ILayer.num_inputs": None,
    "ILayer.num_outputs": None,
    "ILayer.type": None,
    "ILogger.log": ["severity", "msg"],
    "INetworkDefinition.get_flag": ["flag"],
    "INetworkDefinition.get_input": ["index"],
    "INetworkDefinition.get_layer": ["index"],
    "INetworkDefinition.get_output": ["index"],
    "INetworkDefinition.num_inputs": None,
    "INetworkDefinition.num_layers": None,
    "INetworkDefinition.num_outputs": None,
    "IRuntimeConfig.set_execution_context_allocation_strategy": ["strategy"],
    "IProgressMonitor.phase_finish": ["phase_name"],
    "IProgressMonitor.phase_start": ["phase_name", "parent_phase", "num_steps"],
    "IProgressMonitor.step_complete": ["phase_name", "step"],
    "ITensor.dtype": None,
    "ITensor.get_dimension_name": ["index"],
    "ITensor.name": None,
    "ITensor.shape": None,
    "ITimingCache.serialize": [],
    "MemoryPoolType.WORKSPACE": None,
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": None,
    "OnnxParser.get_error": ["index"],
    "OnnxParser.num_errors": None,
    "OnnxParser.parse": ["model", "path"],
    "ParserError.desc": [],
    "ParserError.node": [],
    "ParserError.node_name": [],
    "ParserError.node_operator": [],
    "ProfilingVerbosity.DETAILED": None,
    "Runtime.deserialize_cuda_engine": ["serialized_engine"],
}
# Used where the backend is tensorrt-rtx alone; full TensorRT compiles nothing at run time.
RTX_ONLY = {
    "DynamicShapesKernelSpecializationStrategy.EAGER": None,
    "BuilderFlag.REQUIRE_USER_ALLOCATION": None,
    "DynamicShapesKernelSpecializationStrategy.NONE": None,
    "IBuilderConfig.set_flag": ["flag"],
    "IExecutionContext.is_stream_capturable": ["stream"],
    "IRuntimeCache.deserialize": ["blob"],
    "IRuntimeCache.serialize": [],
    "IRuntimeConfig.create_runtime_cache": [],
    "IRuntimeConfig.set_runtime_cache": ["cache"],
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": None,
}
# Kinds of layers and types that the proof looks for by name.
MEMBERS = {
    "LayerType": "ATTENTION_INPUT ATTENTION_OUTPUT CAST CONSTANT DEQUANTIZE ELEMENTWISE IDENTITY KV_CACHE_UPDATE"
    " MATRIX_MULTIPLY REDUCE SHUFFLE SQUEEZE UNSQUEEZE",
    "DataType": "FLOAT HALF BF16 INT8 INT4 INT64",
}
# Names of TensorRT's API that in our files are Python's or our own.
OURS = {
    "append",
    "builder",
    "data",
    "engine",
    "enqueue",
    "flags",
    "kind",
    "nbytes",
    "pop",
    "progress_monitor",
    "size",
    "start",
    "tensorrt_version",
    "value",
}


def members():
    return [f"{owner}.{name}" for owner, names in MEMBERS.items() for name in names.split()]


def find_installed(dotted):
    found = trt
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


def arguments(function):
    """Names of the arguments, of each overload, as pybind11 writes them into the docstring."""
    return [
        re.findall(r"[(,] (\w+): ", re.sub(r"\[[^\]]*\]", "", line)) or []
        for line in re.findall(r"\w+(\(self: .*\)) ->", function.__doc__)
    ]


def used_names(source):
    """Every attribute that a file reads, calls or overrides by name."""
    tree = ast.parse(source)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def api_names():
    """Every public name of the API: of the module's classes, and of what they hold."""
    classes = {name: thing for name, thing in vars(trt).items() if isinstance(thing, type)}
    return {name for thing in classes.values() for name in dir(thing) if not name.startswith("_")} | set(classes)


@pytest.mark.parametrize(("dotted", "expected"), [*CALLS.items(), *RTX_ONLY.items()])
def test_installed_tensorrt_rtx_has_it(dotted, expected):
    found = find_installed(dotted)
    if expected is not None:
        assert any(given[: len(expected)] == expected for given in arguments(found)), found.__doc__


@pytest.mark.parametrize(("dotted", "expected"), CALLS.items())
def test_the_wheel_of_full_tensorrt_has_it(dotted, expected):
    assert misfit(dotted, expected) is None


def misfit(dotted, expected):
    """What is wrong with a call by the symbols of the wheel; None if nothing."""
    owner, _, name = dotted.partition(".")
    for word in filter(None, (owner, name)):
        if not any(known.endswith(word) for known in WHEEL["names"]) and dotted not in WHEEL["signatures"]:
            return f"no {word}"
    given = WHEEL["signatures"].get(dotted)
    if expected and given is not None and given[: len(expected)] != expected:
        return f"{dotted} takes {given}"
    return None


def test_what_only_tensorrt_rtx_has_is_told_apart():
    """The twin: the check can fail."""
    assert misfit("Runtime.get_engine_validity", ["buffer"]) == "no get_engine_validity"
    assert misfit("DynamicShapesKernelSpecializationStrategy.EAGER", None)
    assert misfit("IExecutionContext.set_input_shape", ["shape", "name"]) is not None
    assert hasattr(trt.Runtime, "get_engine_validity")


def test_most_signatures_of_the_wheel_are_known():
    known = [dotted for dotted, expected in CALLS.items() if expected is not None and dotted in WHEEL["signatures"]]
    assert len(known) >= 20
    assert WHEEL["version"].startswith("11.") and len(WHEEL["sha256"]) == 64


@pytest.mark.parametrize("dotted", members())
def test_layers_and_types_have_these_names_in_both(dotted):
    assert find_installed(dotted).name == dotted.partition(".")[2]
    assert misfit(dotted, None) is None


def test_the_table_is_complete():
    table = {word for dotted in (*CALLS, *RTX_ONLY, *members()) for word in dotted.split(".")}
    table |= {"ILogger", "IProgressMonitor", "Builder", "OnnxParser", "Runtime"}
    used = set().union(*(used_names((ROOT / file).read_text()) for file in FILES))
    assert (used & api_names()) - OURS - table == set()
    assert {"set_tensor_address", "get_layer", "STRONGLY_TYPED"} <= used  # the twin: they are seen


def test_no_other_file_uses_tensorrt():
    """What only TensorRT has is used nowhere else, so that the list of files is complete."""
    telling = {"set_tensor_address", "deserialize_cuda_engine", "get_layer", "create_network", "OnnxParser"}
    others = {
        path.relative_to(ROOT).as_posix()
        for folder in ("exporters", "runtime", "lrt_deploy")
        for path in (ROOT / folder).rglob("*.py")
        if used_names(path.read_text()) & telling
    }
    assert others <= set(FILES)


@pytest.mark.parametrize(
    ("module", "path", "prefix", "least"),
    [
        ("cuda.bindings.driver", "runtime/backends/cuda.py", "cu", 24),
        ("cuda.bindings.runtime", "lrt_deploy/machine.py", "cuda", 5),
    ],
)
def test_every_cuda_call_takes_as_many_arguments_as_we_give(module, path, prefix, least):
    cuda, source = pytest.importorskip(module), (ROOT / path).read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and re.match(rf"{prefix}[A-Z]", node.func.attr)
    ]
    assert len(calls) >= least
    for call in calls:
        signature = getattr(cuda, call.func.attr).__doc__.strip().splitlines()[0]
        taken = signature.partition("(")[2].rpartition(")")[0]
        assert len(call.args) == len([part for part in taken.split(",") if part.strip()]), signature
    for name in re.findall(rf"cuda\.({prefix}[A-Z]\w+(?:\.\w+)?|CU\w+(?:\.\w+)?)", source):
        found = cuda
        for part in name.split("."):
            found = getattr(found, part)
    for name in re.findall(r'"(cu[A-Z]\w+|CUDA_ERROR_\w+)"', source):
        assert hasattr(cuda.CUresult if name.startswith("CUDA_ERROR") else cuda, name)
