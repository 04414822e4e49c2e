"""What `import lrt_deploy` offers: the names of the contract, lazily, typed for a client, and nothing else."""

from __future__ import annotations

import inspect
import os
import pydoc
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy import errors

ROOT = Path(__file__).parents[1]
ERRORS = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
NAMES = {
    *ERRORS,
    *("export_bundle", "build_engine", "open_decoder", "parity", "__version__"),
    *("Decoder", "DecodeState", "BatchDecoder", "PromptCache", "SamplingOptions", "PrefillOptions", "Event", "Grammar"),
}
CLIENT = """
import lrt_deploy

manifest = lrt_deploy.export_bundle("checkpoint", "bundle", precision=["fp32"], max_seq_len=64)
with lrt_deploy.open_decoder("bundle", backend="ort-cpu") as decoder:
    state = decoder.prefill([[1, 2, 3]], policy="auto")
    reveal_type(state)
    reveal_type(decoder.step(state, [1]))
    for event in decoder.generate([1, 2], max_new_tokens=4, temperature=0.0):
        reveal_type(event)
cache = lrt_deploy.PromptCache("folder")
error: type[lrt_deploy.LRTDeployError] = lrt_deploy.Busy
reveal_type(lrt_deploy.__version__)
decoder.prefill([[1]], policy="guess")
decoder.generate([1], temprature=0.5)
reveal_type(decoder.score([[1, 2]]))
"""


def test_the_public_names_are_those_of_the_contract():
    assert set(lrt_deploy.__all__) >= NAMES
    assert dir(lrt_deploy) == sorted(lrt_deploy.__all__)
    assert all(getattr(lrt_deploy, name) is not None for name in lrt_deploy.__all__)
    assert lrt_deploy.__version__ == version("lrt-deploy")
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = lrt_deploy.Nonsense


def test_every_error_is_public_and_in_one_tree():
    assert all(issubclass(getattr(lrt_deploy, name), lrt_deploy.LRTDeployError) for name in ERRORS)
    assert issubclass(lrt_deploy.NonFiniteError, lrt_deploy.BackendError)
    assert all(name in errors.__doc__ for name in ERRORS)


def test_sampling_options_and_their_keyword_arguments_are_the_same():
    from lrt_deploy.runtime.sampling import SamplingArguments

    assert list(SamplingArguments.__annotations__) == list(lrt_deploy.SamplingOptions.__dataclass_fields__)


def test_importing_the_package_loads_nothing_of_the_runtime():
    code = (
        "import sys, lrt_deploy; dir(lrt_deploy)\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('numpy', 'torch', 'onnx', 'onnxruntime', 'typer')"
        " or n.startswith('lrt_deploy.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "['lrt_deploy.errors']\n"


def test_functions_are_there_where_torch_and_graph_tools_are_not():
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt'): sys.modules[name] = None\n"
        "import lrt_deploy\n"
        "print([bool(getattr(lrt_deploy, name).__doc__) for name in ('export_bundle', 'build_engine', 'parity')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[True, True, True]\n"


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("from lrt_deploy.runtime.batch_decoder import BatchDecoder as old", "lrt_deploy.runtime.batch.BatchDecoder"),
        ("import lrt_deploy.contract; old = lrt_deploy.contract", "lrt_deploy.bundle.contract"),
        ("import lrt_deploy.manifest; old = lrt_deploy.manifest", "lrt_deploy.bundle.manifest"),
        ("from lrt_deploy import chat_form as old", "lrt_deploy.text.chat"),
        ("from lrt_deploy.checkpoint import open_checkpoint as old", "lrt_deploy.model.checkpoint.open_checkpoint"),
        ("from lrt_deploy.model import LRT as old", "lrt_deploy.model.model.LRT"),
        ("from lrt_deploy.reference import ReferenceDecoder as old", "lrt_deploy.model.reference.ReferenceDecoder"),
        ("from lrt_deploy.tokenizer import Tokenizer as old", "lrt_deploy.text.tokenizer.Tokenizer"),
        ("from lrt_deploy.weights import weight_sources as old", "lrt_deploy.bundle.weights.weight_sources"),
    ],
)
def test_a_name_that_older_documents_had_still_works_and_says_where_it_is_now(line, new):
    code = f"{line}\nimport pkgutil\nassert old is pkgutil.resolve_name({new!r}); print(old)"
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "DeprecationWarning" in result.stderr and "<string>:1" in result.stderr, result.stderr
    assert new.rpartition(".")[0] in result.stderr or new in result.stderr


@pytest.mark.parametrize("name", sorted(NAMES - ERRORS - {"__version__"}))
def test_help_explains_every_function_and_class(name):
    thing = getattr(lrt_deploy, name)
    assert inspect.getdoc(thing)
    text = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    methods = [member for member, _ in inspect.getmembers(thing, inspect.isfunction) if not member.startswith("_")]
    assert all(inspect.getdoc(getattr(thing, method)) for method in methods) and name in text


@pytest.mark.slow
@pytest.mark.parametrize("install", ["editable", "wheel"])
def test_a_client_s_mypy_sees_the_types(tmp_path, install):
    """`wheel`: its files in a folder; `tests/test_packaging.py` holds that a wheel has the files of the tree."""
    folder = None
    if install == "wheel":
        folder = tmp_path / "installed"
        shutil.copytree(ROOT / "lrt_deploy", folder / "lrt_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    elif not (ROOT / "pyproject.toml").samefile(Path(lrt_deploy.__file__).parents[1] / "pyproject.toml"):
        pytest.skip("lrt_deploy is not installed editable from this tree")
    found = client_types(tmp_path, folder)
    for kind in ("runtime.state.DecodeState", "ndarray", "runtime.generation.Event", "str"):
        assert kind in found, found
    assert "\"Literal['guess']\"; expected" in found or "has incompatible type \"Literal['guess']\"" in found, found
    assert 'Unexpected keyword argument "temprature"' in found, found
    assert found.count(": error:") == 2, found


def client_types(folder, package):
    """What mypy says of the client file when it finds the package in a folder; None: where it is installed."""
    (folder / "client.py").write_text(CLIENT)
    command = [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", "client.py"]
    settings = {"MYPY_CACHE_DIR": os.devnull} | ({"MYPYPATH": str(package)} if package else {})
    result = subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=400, check=False
    )
    return result.stdout + result.stderr
