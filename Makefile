# make demo: from a bare clone to pictures.  make test: the fast tests.  Only python3 and make are needed.
PYTHON ?= python3
# Two processes: most of a test is compilation, which runs on one core.
PARALLEL ?= -n 2 --dist loadfile
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip
PY     := $(VENV)/bin/python

.PHONY: demo test test-all lint wheel clean

demo: $(VENV)/.installed
	$(VENV)/bin/lcm-jax demo --out out/demo

test: $(VENV)/.tests lint
	$(PY) -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.tests lint
	$(PY) -m pytest $(PARALLEL)

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(VENV)/.tests
	$(PIP) wheel --no-deps --wheel-dir dist .

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable .
	touch $@

# The oracles run on the CPU: take a CPU build of torch where one is to be had, before pip would pick a CUDA one.
$(VENV)/.tests: $(VENV)/.installed
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install --quiet torch==2.13.0 || $(PIP) install --quiet torch
	$(PIP) install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
