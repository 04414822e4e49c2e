# make demo: export the demo checkpoint, prove parity, generate.   make test: everything.   make check: before a commit.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo/bundle

.PHONY: install demo test check kills clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: install
	$(BIN)/lrt-deploy export demo/checkpoint $(DEMO) --max-seq-len 1024 --force
	$(BIN)/lrt-deploy parity $(DEMO) --checkpoint demo/checkpoint
	$(BIN)/lrt-deploy generate $(DEMO) --prompt-file demo/prompt.txt --max-new-tokens 96

# One thread a worker: the test models are small, and two workers share the machine.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest --quiet tests/test_types.py tests/test_layout.py
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 -m "not slow"

# 100 kills of each thing that writes files, and as many full disks and file limits; ten minutes.
kills: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py tests/data/golden/padded_vocab --trials 100

clean:
	rm -rf .venv build dist *.egg-info demo/bundle .pytest_cache .mypy_cache .ruff_cache .hypothesis
