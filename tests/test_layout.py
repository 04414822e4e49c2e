"""The shape of the house: who may import what, how long things get, and which names are not used.

Imports are read from the syntax tree, wherever they stand in a file, so nothing is run and nothing heavy is loaded.
"""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"lrt_deploy": "lrt_deploy", "exporters": "lrt_deploy.exporters", "runtime": "lrt_deploy.runtime"}

TORCH = ("torch",)
GRAPH_TOOLS = ("onnx", "onnxscript", "onnx_ir")
TENSORRT = ("tensorrt", "tensorrt_rtx")
CUDA = ("cuda",)
EXPORTERS, RUNTIME, CLI = ("lrt_deploy.exporters",), ("lrt_deploy.runtime",), ("lrt_deploy.cli",)
MODEL, EVALUATION = ("lrt_deploy.model",), ("lrt_deploy.evaluation",)


class Rule(NamedTuple):
    """`files` (without `but`) must not import `forbidden` (without `allowed`); `late`: inside functions they may."""

    why: str
    files: tuple[str, ...]
    forbidden: tuple[str, ...]
    but: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    late: bool = False


RULES = (
    Rule(
        "errors, fields, config and files come first: they know nothing of the project but errors and fields",
        files=tuple(f"lrt_deploy/{name}.py" for name in ("errors", "fields", "config", "files")),
        forbidden=("lrt_deploy",),
        allowed=("lrt_deploy.errors", "lrt_deploy.fields"),
    ),
    Rule(
        "the vocabulary does not know who uses it",
        files=("lrt_deploy/*",),
        # `evaluation/parity` brings reference and decoder together, as the command line does: users' own tests call it.
        but=("lrt_deploy/cli/*", "lrt_deploy/__init__.py", "lrt_deploy/__main__.py", "lrt_deploy/evaluation/parity.py"),
        forbidden=EXPORTERS + RUNTIME + CLI,
    ),
    Rule(
        "modules at the top know no folder",
        files=("lrt_deploy/*",),
        but=("lrt_deploy/*/*", "lrt_deploy/__init__.py", "lrt_deploy/__main__.py"),
        forbidden=("lrt_deploy.text", "lrt_deploy.bundle", *MODEL, *EVALUATION),
    ),
    Rule(
        "text comes before bundles",
        files=("lrt_deploy/text/*",),
        forbidden=("lrt_deploy.bundle", *MODEL, *EVALUATION),
    ),
    Rule(
        "bundles come before models; what lies at a path may be a checkpoint, by the names of its files",
        files=("lrt_deploy/bundle/*",),
        forbidden=MODEL + EVALUATION,
        allowed=("lrt_deploy.model.checkpoint_folder.is_checkpoint",),
    ),
    Rule(
        "the reference model and what compares it do not know each other; `evaluation/parity` opens both",
        files=("lrt_deploy/model/*",),
        forbidden=EVALUATION,
    ),
    Rule(
        "the reference model and what compares it do not know each other; `evaluation/parity` opens both",
        files=("lrt_deploy/evaluation/*",),
        but=("lrt_deploy/evaluation/parity.py",),
        forbidden=MODEL,
    ),
    Rule("parity as a function is not the command line", files=("lrt_deploy/evaluation/*",), forbidden=CLI),
    Rule(
        "parity as a function loads reference and decoder when it is called",
        files=("lrt_deploy/evaluation/*",),
        forbidden=TORCH + GRAPH_TOOLS + MODEL + EXPORTERS + RUNTIME,
        late=True,
    ),
    Rule(
        "exporters and runtime meet in the bundle, and neither knows the command line",
        files=("exporters/*",),
        forbidden=RUNTIME + CLI,
    ),
    Rule(
        "exporters and runtime meet in the bundle, and neither knows the command line",
        files=("runtime/*",),
        forbidden=EXPORTERS + CLI,
    ),
    Rule(
        "a deployment has no torch and no graph tools",
        files=("runtime/*",),
        forbidden=TORCH + GRAPH_TOOLS + MODEL,
    ),
    Rule(
        "torch is the reference's and the exporters'",
        files=("*",),
        but=("exporters/graph/*", "exporters/quantize/*", "exporters/bundle.py", "lrt_deploy/model/*"),
        forbidden=TORCH,
    ),
    Rule(
        "ONNX Runtime stays behind its backends, and the exporters' check of what they wrote",
        files=("*",),
        but=("runtime/backends/ort_*.py", "exporters/graph/verify.py"),
        forbidden=("onnxruntime",),
    ),
    Rule(
        "TensorRT stays in the files that say so",
        files=("*",),
        but=("runtime/backends/tensorrt*.py", "exporters/engine/*"),
        forbidden=TENSORRT,
    ),
    Rule(
        "CUDA is asked in two places: whether there is a GPU, and the runtime's device",
        files=("*",),
        but=("lrt_deploy/machine.py", "runtime/backends/cuda.py"),
        forbidden=CUDA,
    ),
    Rule(
        "Polygraphy decides once per process which TensorRT it drives: only the builder may import it",
        files=("*",),
        but=("exporters/engine/tensorrt.py",),
        forbidden=("polygraphy",),
    ),
    Rule(
        "HTTP is in three files",
        files=("*",),
        but=("runtime/serving/app.py", "runtime/serving/server.py", "runtime/serving/replicas/front.py"),
        forbidden=("starlette", "uvicorn"),
    ),
    Rule(
        "the API's logic, the engine and batches in files need no HTTP",
        files=("runtime/*",),
        but=("runtime/serving/app.py", "runtime/serving/server.py", "runtime/serving/replicas/*"),
        forbidden=("lrt_deploy.runtime.serving.app", "lrt_deploy.runtime.serving.server"),
    ),
    Rule("Ray is in one file", files=("*",), but=("runtime/serving/replicas/cluster.py",), forbidden=("ray",)),
    Rule(
        "what runs models does not know who serves them",
        files=("runtime/*",),
        but=("runtime/serving/*",),
        forbidden=("lrt_deploy.runtime.serving",),
    ),
    Rule(
        "`lrt-deploy --help` and `import lrt_deploy` answer at once: heavy things come inside functions",
        files=("lrt_deploy/cli/*", "lrt_deploy/__init__.py"),
        forbidden=TORCH + GRAPH_TOOLS + TENSORRT + ("onnxruntime",) + MODEL + EXPORTERS + RUNTIME,
        late=True,
    ),
)

# What loading a file must not load through any chain of the project's own modules.
UNREACHABLE = {
    "runtime/*": TORCH + GRAPH_TOOLS,
    "runtime/serving/jsonl.py": ("starlette", "uvicorn"),
    "lrt_deploy/cli/*": TORCH + GRAPH_TOOLS + TENSORRT + ("onnxruntime",),
    "lrt_deploy/__init__.py": TORCH + GRAPH_TOOLS + TENSORRT + ("onnxruntime",),
}

FILE_LINES, FUNCTION_LINES = 600, 80
# A file ("runtime/x.py") or function ("runtime/x.py:f") that is longer for a reason: its own limit, and the reason.
LONGER: dict[str, tuple[int, str]] = {}

UNUSED_NAMES = {"util", "utils", "common", "helper", "helpers"}


class Import(NamedTuple):
    """One imported name, in full: for `from a import b` that is a.b, which may be a module or a thing in one."""

    name: str
    line: int
    late: bool
    typing: bool = False  # under TYPE_CHECKING


def module_name(path):
    folder, *rest = Path(path).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path, source):
    """Every import of a file, also importlib.import_module("..."); late: loading the file does not run it."""
    module = module_name(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    found = []

    def visit(node, late, typing):
        found.extend(Import(name, node.lineno, late, typing) for name in imported_names(node, package))
        typing = typing or only_for_types(node)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing
        for child in ast.iter_child_nodes(node):
            visit(child, late, typing)

    visit(ast.parse(source), late=False, typing=False)
    return found


def imported_names(node, package):
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            origin = absolute("." * node.level + (node.module or ""), package)
            return [f"{origin}.{alias.name}" for alias in node.names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [absolute(name, package)]
    return []


def absolute(name, package):
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return name
    parts = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*parts, name[level:]]).rstrip(".")


def only_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def within(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def matches(path, patterns):
    return any(fnmatch(path, pattern) for pattern in patterns)


def violations(path, source):
    return [
        f"{path}:{found.line} imports {found.name}; {rule.why}"
        for rule in RULES
        if matches(path, rule.files) and not matches(path, rule.but)
        for found in imports(path, source)
        if within(found.name, rule.forbidden) and not within(found.name, rule.allowed)
        if not (rule.late and found.late)
    ]


@cache
def sources():
    """Path relative to the root -> text, of every file."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def reached(path, files):
    """Full names that loading `path` imports, through the project's own modules and their packages: name -> by whom."""
    modules = {module_name(p): p for p in files}
    names, todo, done = {}, [module_name(path)], set()
    while todo:
        parts = todo.pop().split(".")
        for module in {".".join(parts[: i + 1]) for i in range(len(parts))} & (modules.keys() - done):
            done.add(module)
            early = [found.name for found in imports(modules[module], files[modules[module]]) if not found.late]
            names |= dict.fromkeys(early, modules[module])
            todo += early
    return names


def circles(files):
    """Pairs of modules that import each other, directly or through others; imports in functions count.

    Not counted: imports for types alone, and that of a package by what it holds.
    """
    modules = {module_name(path): path for path in files}
    targets = {}
    for module, path in modules.items():
        names = [found.name for found in imports(path, files[path]) if not found.typing]
        direct = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
        targets[module] = direct - {module}
    reach = {module: closure(module, targets) for module in modules}
    return sorted((a, b) for a in modules for b in reach[a] if a < b and a in reach[b])


def closure(start, targets):
    """Everything that can be reached from `start`."""
    found, todo = set(), [start]
    while todo:
        new = targets[todo.pop()] - found
        found |= new
        todo += new
    return found


def lines(path, source):
    """Lines of the file and of each of its functions, with the limit that goes for each."""
    yield path, source.count("\n"), FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.name}", node.end_lineno - node.lineno + 1, FUNCTION_LINES


def too_long(path, source):
    found = ((name, count, LONGER.get(name, (limit, ""))[0]) for name, count, limit in lines(path, source))
    return [f"{name} has {count} lines, the limit is {limit}" for name, count, limit in found if count > limit]


def test_imports_follow_the_table():
    found = [violation for path, source in sources().items() for violation in violations(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_loading_a_file_reaches_nothing_heavy():
    found = [
        f"loading {path} loads {name}, by way of {via}"
        for pattern, forbidden in UNREACHABLE.items()
        for path in sources()
        if fnmatch(path, pattern)
        for name, via in reached(path, sources()).items()
        if within(name, forbidden)
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_modules_import_each_other():
    assert circles(sources()) == []


def test_a_circle_is_noticed_through_a_third_module_and_inside_a_function():
    files = {
        "runtime/a.py": "from .b import f",
        "runtime/b.py": "def f():\n    from lrt_deploy.runtime import c",
        "runtime/c.py": "import lrt_deploy.runtime.a",
        "runtime/d.py": "from .a import f\nif TYPE_CHECKING:\n    from .e import E",
        "runtime/e.py": "from .d import g",
    }
    names = [f"lrt_deploy.runtime.{letter}" for letter in "abc"]
    assert circles(files) == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    assert circles(files | {"runtime/c.py": ""}) == []


def test_files_and_functions_stay_short():
    found = [line for path, source in sources().items() for line in too_long(path, source)]
    assert not found, "\n".join(["", *found, "Split it, or state in LONGER why it is better whole."])


def test_every_exception_to_the_lengths_is_needed_and_explained():
    beyond = {n for path, source in sources().items() for n, count, limit in lines(path, source) if count > limit}
    assert LONGER.keys() <= beyond
    assert all(reason for _, reason in LONGER.values())


def test_no_module_is_named_after_nothing():
    words = {path: set(re.split(r"[/_.]", path)) for path in sources()}
    assert not [path for path, found in words.items() if found & UNUSED_NAMES]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lrt_deploy/errors.py", "from . import model"),
        ("lrt_deploy/config.py", "import lrt_deploy.bundle.weights"),
        ("lrt_deploy/bundle/manifest.py", "from lrt_deploy import exporters"),
        ("lrt_deploy/files.py", "from .bundle import manifest"),
        ("lrt_deploy/types.py", "from .bundle import manifest"),
        ("lrt_deploy/text/chat.py", "from lrt_deploy.bundle import manifest"),
        ("lrt_deploy/bundle/manifest.py", "from lrt_deploy.model.checkpoint import load"),
        ("lrt_deploy/model/reference.py", "from lrt_deploy.evaluation import rollout"),
        ("lrt_deploy/evaluation/checks.py", "def f():\n    from lrt_deploy.model import reference"),
        ("lrt_deploy/bundle/manifest.py", "from ..runtime.sampling import Sampler"),
        ("lrt_deploy/evaluation/verdict.py", "def f():\n    from ..cli import app"),
        ("exporters/bundle.py", "import lrt_deploy.runtime.decoder as d"),
        ("exporters/bundle.py", "from ..runtime import decoder"),
        ("runtime/decoder.py", "from lrt_deploy.exporters.bundle import read"),
        ("runtime/decoder.py", "def f():\n    import torch.nn"),
        ("runtime/decoder.py", "import importlib\nimportlib.import_module('onnx')"),
        ("runtime/decoder.py", "if TYPE_CHECKING:\n    from onnx_ir import Model"),
        ("runtime/decoder.py", "from lrt_deploy.model.model import LRT"),
        ("runtime/decoder.py", "import onnxruntime as ort"),
        ("runtime/batch.py", "from .serving.engine import Engine"),
        ("runtime/serving/engine.py", "from starlette.routing import Route"),
        ("runtime/serving/jsonl.py", "def f():\n    from .app import App"),
        ("lrt_deploy/cli/serve.py", "def serve():\n    import uvicorn"),
        ("runtime/backends/ort_cpu.py", "import tensorrt"),
        ("exporters/graph/trace.py", "from tensorrt_rtx import Builder"),
        ("exporters/engine/build.py", "import polygraphy.backend.trt"),
        ("runtime/decoder.py", "import importlib\nimportlib.import_module('cuda.bindings.runtime')"),
        ("lrt_deploy/text/tokenizer.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("lrt_deploy/evaluation/parity.py", "from lrt_deploy.runtime import open_decoder"),
        ("lrt_deploy/evaluation/parity.py", "def f():\n    from ..cli import app"),
        ("lrt_deploy/cli/app.py", "from lrt_deploy.runtime import open_decoder"),
        ("lrt_deploy/cli/app.py", "class A:\n    import onnx"),
        ("lrt_deploy/cli/app.py", "from ..model.checkpoint import load"),
        ("lrt_deploy/__init__.py", "from .exporters import export_bundle"),
    ],
)
def test_the_table_notices(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lrt_deploy/config.py", "from .errors import ConfigError\nimport json"),
        ("lrt_deploy/model/reference.py", "import torch\nfrom .model import LRT"),
        ("exporters/graph/trace.py", "import torch, onnx_ir\nfrom lrt_deploy.model.model import LRT"),
        ("exporters/engine/build.py", "import tensorrt"),
        ("runtime/backends/ort_cpu.py", "import onnxruntime\nfrom .sampling import Sampler"),
        ("runtime/backends/tensorrt_rtx.py", "import tensorrt_rtx"),
        ("runtime/backends/cuda.py", "from cuda.bindings import runtime"),
        ("runtime/serving/server.py", "import uvicorn\nfrom .app import App"),
        ("lrt_deploy/cli/serve.py", "def serve():\n    from lrt_deploy.runtime.serving.server import Server"),
        ("runtime/torchless.py", "import onnxruntime_genai, torchless"),
        ("lrt_deploy/cli/app.py", "def run():\n    from lrt_deploy.runtime import open_decoder"),
        ("lrt_deploy/cli/app.py", "if TYPE_CHECKING:\n    from lrt_deploy.runtime import Decoder"),
        ("lrt_deploy/__init__.py", "def open_decoder():\n    from .runtime import decoder"),
    ],
)
def test_the_table_allows(path, source):
    assert violations(path, source) == []


def test_a_heavy_import_is_followed_through_modules_and_packages():
    files = {
        "lrt_deploy/__init__.py": "from .middle import f",
        "lrt_deploy/middle.py": "from .model import model\ndef f():\n    import onnx",
        "lrt_deploy/model/model.py": "import torch.nn",
        "runtime/sampling.py": "import numpy",
    }
    assert reached("runtime/sampling.py", files)["torch.nn"] == "lrt_deploy/model/model.py"
    assert "onnx" not in reached("runtime/sampling.py", files)


def test_length_limits_can_fail():
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES
    assert too_long("runtime/x.py", function) == ["runtime/x.py:f has 81 lines, the limit is 80"]
    assert too_long("runtime/x.py", "\n" * 601) == ["runtime/x.py has 601 lines, the limit is 600"]
    assert too_long("runtime/x.py", "\n" * 600) == []


def walks():
    """(file, functions) of each step in the two walks of docs/architecture.md, by the heading of the walk."""
    found = {}
    for section in re.split(r"^## ", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), flags=re.M):
        heading, _, text = section.partition("\n")
        rows = re.findall(r"^\| [^|]+ \| `([^`|]+\.py)` \| ([^|]+) \|$", text, flags=re.M)
        if rows:
            found[heading] = [(path, re.findall(r"`(\w+)`", names)) for path, names in rows]
    return found


def test_the_walks_through_the_architecture_name_functions_that_exist():
    lengths = {heading: len(steps) for heading, steps in walks().items()}
    assert lengths == {"A checkpoint through `export`": 10, "A token through `Decoder.step`": 5}
    missing = [
        f"{path}:{name}"
        for steps in walks().values()
        for path, names in steps
        for name in names
        if not re.search(rf"^ *def {name}\(", sources().get(path, ""), flags=re.M)
    ]
    assert not missing
