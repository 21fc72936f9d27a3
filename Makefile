# One target per chore. Every target sets up what it needs in .venv by itself; nothing has to be installed by hand.
#
#   make serve        set up, then serve (CONFIG=config.yaml, else the demo model) and print the URL
#   make test         set up, then run the whole test suite
#   make lint         ruff, flake8-async, mypy --strict, import-linter
#   make kernel-matrix  compile the GPU kernels for every card: registers, resident warps, spills
#   make test-gpu     kernels and engine on the card that torch sees; EDGEKV_GPU_TESTS=host: on fibers of the host
#   make bench-gpu    what they do on it, against its own bandwidth and other programs (ARGS='--quick --out')
#   make guard        play the traces of bench/traces against a real server: does the memory guard keep its promises?
#
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS passes options to pip (another index, a proxy);
# CONSTRAINTS= (empty) lets pip choose the newest torch, for instance its CUDA build. test-gpu and bench-gpu install
# nothing: GPU_PYTHON names an interpreter whose torch sees the card (.venv's if there is one, else PYTHON).

PYTHON      ?= python3
PIP_ARGS    ?=
CONSTRAINTS ?= constraints.txt
CONFIG      ?=
ARGS        ?=
PYTEST_ARGS ?=
GPU_PYTHON  ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))

# Threads that spin while they wait starve whoever shares the two cores with them.
export GOMP_SPINCOUNT ?= 1000

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on $(PIP_ARGS) \
        $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DELETE_ON_ERROR:
.PHONY: help serve test test-gpu coverage lint format bench bench-gpu kernel-matrix guard demo-model schema wheel clean

help:
	@sed -n 's/^#   make/make/p' $(MAKEFILE_LIST)
	@echo 'also: coverage format bench demo-model schema wheel clean'

# A stamp is written last, so an interrupted install starts again instead of passing for a whole one.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'edgekv needs Python 3.11 or newer; choose one with  make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo '==> making $(VENV) with '"$$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'python3 could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/serve.stamp: $(VENV)/created pyproject.toml constraints.txt
	@echo '==> installing what serving needs (torch is large; this happens once)'
	@$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp pyproject.toml constraints.txt
	@echo '==> installing what tests and lint need'
	@$(PIP) -e '.[dev]'
	@touch $@

serve: $(VENV)/serve.stamp
	@exec $(BIN)/edgekv serve $(CONFIG) $(ARGS)

test: $(VENV)/dev.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $(PYTEST_ARGS)

# Where there may be no plugins of pytest: see tests/gpu/alone.ini.
test-gpu:
	@HF_HUB_OFFLINE=1 timeout -k 10 330 $(GPU_PYTHON) -m pytest -c tests/gpu/alone.ini --rootdir . \
	  --confcutdir tests/gpu -q tests/gpu $(PYTEST_ARGS)

coverage: $(VENV)/dev.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --cov --cov-report=term $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/flake8 --select=ASYNC --extend-ignore=ASYNC114,ASYNC9 --extend-exclude=edgekv/kernels edgekv kernels bench tests packaging
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-logo

format: $(VENV)/dev.stamp
	@$(BIN)/ruff check --fix .

bench: $(VENV)/serve.stamp
	@$(BIN)/python bench/serve.py $(ARGS)

bench-gpu:
	@HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m bench.gpu $(ARGS)

kernel-matrix: $(VENV)/dev.stamp
	@$(BIN)/python packaging/kernel_matrix.py $(ARGS)

guard: $(VENV)/dev.stamp
	@$(BIN)/python -m bench.guard $(or $(TRACES),$(wildcard bench/traces/*.json)) $(ARGS)

demo-model: $(VENV)/dev.stamp
	@PYTHONPATH=packaging $(BIN)/python -m demo_model.train $(ARGS)

schema: $(VENV)/serve.stamp
	@$(BIN)/edgekv check --schema > edgekv/config/schema.json.new && mv edgekv/config/schema.json.new edgekv/config/schema.json

wheel: $(VENV)/dev.stamp
	@$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
