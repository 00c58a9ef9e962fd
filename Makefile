# make demo and make test are all a newcomer needs: each makes the virtual environment first if it is missing.
PYTHON ?= python3
CUDA ?= 13
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := --constraint constraints.txt --editable '.[cuda$(CUDA),dev]'
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test test-faults test-gpus lint types format docs bench clean

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# What needs two or more GPUs, on as many as there are; without the environment: python -m pytest -m gpus
test-gpus: $(READY)
	$(BIN)/python -m pytest -m gpus

# 25 random kills of conversions and of trainings each, every stage, full disks, a fuzzer, a Ray cluster that loses a node, every signal:
# a quarter of an hour on two cores.
# FAULTS_SEED=N draws what an earlier run drew.
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults
	ALL_SIGNALS=1 $(BIN)/python -m pytest tests/test_signals.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; to search in it, serve it: python3 -m http.server --directory site"

bench: $(READY)
	$(BIN)/python tools/bench_scan.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vimfast needs Python 3.10 or newer; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): torch, the CUDA libraries and DALI, about 3 GB to download and 7 GB on disk"
	$(if $(UV),uv pip install --python $(BIN)/python $(PACKAGES) ||) $(BIN)/python -m pip install $(PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo site
