"""The package `web`: a folder of static files that runs the bundle in a browser, with no network beyond the folder.

ONNX Runtime's WebAssembly build and the tokenizer library come from a folder with npm packages, which the user names;
nothing is downloaded here. The page binds by the manifest's contract alone (`decoder.js`).
"""

from __future__ import annotations

from pathlib import Path

from lrt_deploy.bundle.manifest import TOKENIZER, graph_path, weights_path
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.packages.source import Source
from lrt_deploy.text.tokenizer import TOKENIZER_FILE

# The npm packages, the versions that the tests ran with, and what the page takes of them.
NPM_PACKAGES = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
ASSETS = {
    "onnxruntime-web/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
    "@huggingface/tokenizers/LICENSE": "tokenizers.LICENSE",
}
_PAGE = ("index.html", "page.css", "page.js", "worker.js", "decoder.js")
COMMAND = "python3 -m http.server --bind 127.0.0.1 8000"


def write(source: Source) -> str:
    """Write the page, the libraries, one graph, its weights and the tokenizer; return the command that serves them."""
    precision, manifest = source.precision, source.manifest
    types = {spec["dtype"] for spec in manifest.contracts[precision]["windowed"]["inputs"]}
    if manifest.host_embeddings or not types <= {"int64", "float32"}:
        kept = "whose embedding tables are on the host" if manifest.host_embeddings else f"in {precision}"
        raise ExportError(
            f"{source.bundle} is a bundle {kept}; a browser runs graphs with a float32 state and the tables inside. "
            "Export it with --precision fp32, or int8-weight-only, and without --host-embeddings"
        )
    if manifest.tokenizer_tokens is None:
        raise ExportError(f"{source.bundle} has no tokenizer, and the page takes text; export it with --tokenizer")
    assets = find_assets(source.options.assets)
    for name, path in assets.items():
        source.copy_file(path, f"lib/{name}")
    graph = graph_path(precision, "prefill", "windowed")
    names = [graph, weights_path(precision), f"{TOKENIZER}/{TOKENIZER_FILE}"]
    source.copy_bundle("bundle/", names)
    for name in _PAGE:
        source.write_template(f"web/{name}", {"graph": graph, "weights": weights_path(precision)})
    size = sum(record.bytes for record in source.records.values())
    source.write_template("web/README.md", {"command": COMMAND, "megabytes": f"{size / 1e6:.0f}"})
    return COMMAND


def npm_line(folder: str = "web-assets") -> str:
    """Return the command that makes a folder of assets."""
    return f"npm install --prefix {folder} " + " ".join(f"{name}@{v}" for name, v in NPM_PACKAGES.items())


def find_assets(folder: Path | None) -> dict[str, Path]:
    """Return the libraries' files by their names in the package; `folder` is where npm has installed them.

    Raises ExportError with the command that makes such a folder.
    """
    if folder is None:
        raise ExportError(
            f"the page needs two npm packages; run `{npm_line()}` and pass --assets web-assets (assets=...)"
        )
    modules = folder / "node_modules" if (folder / "node_modules").is_dir() else folder
    if missing := [name for name in ASSETS if not (modules / name).is_file()]:
        raise ExportError(f"{modules} has no {missing[0]}; run `{npm_line(str(folder))}`, which puts it there")
    return {name: modules / path for path, name in ASSETS.items()}
