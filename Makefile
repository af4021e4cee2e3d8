# make demo: from a bare clone to pictures.  make test: the fast tests.  Only python3 and make are needed.
PYTHON ?= python3
# Two processes: most of a test is compilation, which runs on one core.
PARALLEL ?= -n 2 --dist loadfile
VENV   ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
PIP    := $(VENV)/bin/python -m pip
PY     := $(VENV)/bin/python

.PHONY: demo test test-all test-newest test-oldest lint wheel clean

demo: $(VENV)/.installed
	$(VENV)/bin/lcm-jax demo --out out/demo

test: $(VENV)/.tests lint
	$(PY) -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.tests lint
	$(PY) -m pytest $(PARALLEL)

# The fast tests less the oracles, on the newest jax and flax under the newest Python that is found, 3.12 or later.
test-newest:
	@python=$$(for p in python3.12 python3.13 python3.14 python3.15 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python3; do \
	    "$$p" -c "import sys; v = sys.version_info[:3]; v >= (3, 12) and print(*v, sys.executable)" 2>/dev/null; \
	done | sort -k1,1n -k2,2n -k3,3n | tail -n 1 | cut -d" " -f4-); \
	test -n "$$python" || { echo "test-newest: no Python 3.12 or later found; install one, or put it on PATH" >&2; exit 1; }; \
	echo "test-newest: $$python"; \
	"$$python" -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager jax flax pytest pytest-xdist scipy beartype --editable ".[train,serve]"
	$(NEWEST)/bin/python -c "import sys, jax, flax; print(sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
	$(NEWEST)/bin/python -m pytest -m "not slow" $(PARALLEL) --ignore tests/parity

# The server's fast tests on the lowest version that pyproject.toml allows of each requirement, without torch.
test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) tests/lower_bounds.py > $(OLDEST)/bounds.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/bounds.txt pytest scipy beartype --editable ".[train,serve,quant]"
	$(OLDEST)/bin/python -m pytest -m "not slow" tests/lcm_jax/serve

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
	rm -rf $(VENV) $(NEWEST) $(OLDEST) build dist out *.egg-info
