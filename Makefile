# make demo: export the demo checkpoint, check parity, generate.   make test: everything but servers.
# make test-services: servers as processes.   make check: before a commit.
# make fuzz: hostile inputs in great number (FUZZ_INPUTS, FUZZ_SEED, FUZZ_WORKERS, FUZZ_KINDS); goes on where it stopped.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo/bundle

# The npm packages that the page of `lrt-deploy package --to web` needs; their versions stand in exporters/packages/web/__init__.py.
WEB_ASSETS := build/web-assets

# make ptx: compile the GPU's kernels (runtime/device_loop/kernels.cu) again, by the compiler of PyPI's wheels.
# What runs the package of `lrt-deploy package --to triton` in the tests: tritonserver, and a client.
TRITON_ENV := build/triton
TRITON_PACKAGES := nvidia-pytriton==0.7.0 tritonclient==2.73.0 grpcio==1.85.3 python-rapidjson==1.25 urllib3==2.8.0

.PHONY: install demo test test-services web-assets triton-env docs bench bench-render check ptx kills interrupts fuzz pictures dist wheel-check lock sbom clean

FUZZ_INPUTS ?= 100000
FUZZ_LEAST ?= 5000
FUZZ_SEED ?= 1
FUZZ_WORKERS ?= 2
FUZZ_KINDS ?=
FUZZ_RESULTS ?= build/fuzz

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable} is Python {sys.version.split()[0]}, 3.11 or newer is needed; make PYTHON=python3.11 names another one")'
	@echo 'installing into .venv: 2 GB, some minutes'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: install
	$(BIN)/lrt-deploy export demo/checkpoint $(DEMO) --max-seq-len 1024 --force
	$(BIN)/lrt-deploy parity $(DEMO) --checkpoint demo/checkpoint
	$(BIN)/lrt-deploy generate $(DEMO) --prompt-file demo/prompt.txt --max-new-tokens 96

# One thread a worker: the test models are small, and two workers share the machine.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --ignore tests/services

# Servers as processes, with real clients, Chromium among them; none of these tests may be skipped.
test-services: install web-assets triton-env
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile tests/services

# The documentation site, into build/site; a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'built: build/site/index.html'

# What docs/measurements.md shows: measure, write docs/measurements/*.json, render. Ten minutes; BENCH=full takes longer.
# BENCH_ONLY=decode,prefill measures a part; bench-render measures nothing.
BENCH ?= quick
BENCH_ONLY ?=
MEASUREMENTS := PYTHONPATH=benchmarks $(BIN)/python -P -m measurements

bench: install
	$(MEASUREMENTS) $(if $(filter full,$(BENCH)),--full) $(if $(BENCH_ONLY),--only $(BENCH_ONLY))

bench-render: install
	$(MEASUREMENTS) --render

web-assets: $(WEB_ASSETS)/node_modules/.package-lock.json

$(WEB_ASSETS)/node_modules/.package-lock.json: exporters/packages/web/__init__.py | install
	$$($(BIN)/python -c 'from lrt_deploy.exporters.packages.web import npm_line; print(npm_line("$(WEB_ASSETS)"))') --no-audit --no-fund --ignore-scripts
	@touch $@

triton-env: $(TRITON_ENV)/installed

$(TRITON_ENV)/installed: Makefile exporters/packages/triton/requirements.txt | install
	$(BIN)/python -m venv --clear $(TRITON_ENV)
	$(TRITON_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TRITON_PACKAGES) \
	  --requirement exporters/packages/triton/requirements.txt
	@touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest --quiet tests/test_types.py tests/test_layout.py
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --ignore tests/services -m "not slow"

ptx: install
	$(BIN)/python -m lrt_deploy.runtime.device_loop.make_ptx

# 100 kills of each thing that writes files, and as many full disks and file limits; three minutes.
kills: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py tests/data/golden/padded_vocab --trials 100

# An exception at every line of every operation on states, generations and batches; counts, a line a process. Half an hour.
interrupts: install
	rm -f build/interrupts.jsonl
	LRT_DEPLOY_ALL_LINES=all OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --timeout 0 --numprocesses 2 tests/test_interrupts.py
	cat build/interrupts.jsonl

# Results are lines in build/fuzz: an interrupted campaign of the same commit and seed goes on there. The table by kind
# goes into docs/hostile-inputs.md when all kinds were run.
fuzz: install
	mkdir -p $(FUZZ_RESULTS)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -P -m hostile --inputs $(FUZZ_INPUTS) --least $(FUZZ_LEAST) \
	  --seed $(FUZZ_SEED) --workers $(FUZZ_WORKERS) --kinds "$(FUZZ_KINDS)" --originals $(FUZZ_RESULTS)/originals \
	  --results $(FUZZ_RESULTS)/results-$(FUZZ_SEED).jsonl --summary $(FUZZ_RESULTS)/summary.json \
	  $(if $(FUZZ_KINDS),,--page docs/hostile-inputs.md)

.venv-release/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  build cyclonedx-bom twine uv setuptools
	@touch $@

# The source distribution, the wheel that is built from it, and whether an index would take both.
dist: .venv-release/installed
	rm -rf dist build/lib *.egg-info
	.venv-release/bin/python -m build --no-isolation --outdir dist .
	.venv-release/bin/twine check --strict dist/lrt_deploy-*

# Install the wheel of `make dist` into clean environments, one for each extra, and try its verbs there (EXTRAS: some).
EXTRAS ?= none export serve ray grammar bench report tensorrt-rtx
wheel-check:
	$(PYTHON) tests/wheel_smoke.py dist/*.whl $(EXTRAS)

# requirements.lock: what `make install` installs, with the hashes of the files on PyPI. UV_ARGS: where to look instead.
lock: .venv-release/installed
	.venv-release/bin/uv pip compile --quiet --universal --python-version 3.11.5 --extra test --constraint constraints.txt \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header $(UV_ARGS) \
	  --output-file requirements.lock pyproject.toml

# A bill of materials, CycloneDX JSON, of what this environment has installed.
sbom: install .venv-release/installed
	mkdir -p dist
	.venv-release/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
	  --output-file dist/sbom.cdx.json .venv

# The pictures of the chat page in docs/serving.md; needs Chromium.
pictures: install
	test -e $(DEMO) || $(BIN)/lrt-deploy export demo/checkpoint $(DEMO) --max-seq-len 1024
	$(BIN)/python benchmarks/page_pictures.py $(DEMO) docs

clean:
	rm -rf .venv .venv-release build dist *.egg-info demo/bundle .pytest_cache .mypy_cache .ruff_cache .hypothesis
