# Every target may be the first one on a fresh machine: it makes .venv and installs what it needs.
#   make PYTHON=python3.12 test    another interpreter (3.11 or newer) for a new .venv
#   make test JOBS=8               more test processes
#   make demo SMALL=1              a shorter demo; PRESETS=1 a longer one, with FasterCache, PAB and ToCa
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
# Without byte code every process of the tests would compile what it imports anew.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip
options := $(if $(filter-out 0,$(SMALL)),--small) $(if $(filter-out 0,$(PRESETS)),--presets)

.PHONY: venv demo test test-models test-foreign models lint bench benchmarks-page

venv: .venv/.with-dev

demo: .venv/.with-examples
	@$(BIN)/python -m examples.demo $(options)

# One thread per test process: the models are tiny, and threads would only fight over the cores. The tests of a
# file run in one process, where they share captures.
test: .venv/.with-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Every class and every pipeline of diffusers, and all cases of other tests of which `make test` takes a few;
# SEED chooses them.
test-models: .venv/.with-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --every-model -m "few and not foreign_fault"

# Faults of other libraries' present versions, which docs/coming-from.md speaks of: one that fails was mended.
test-foreign: .venv/.with-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m foreign_fault

# Writes docs/models.md: what works with every class and every pipeline.
models: .venv/.with-test
	@OMP_NUM_THREADS=1 $(BIN)/python tests/kit/models_page.py

lint: .venv/.with-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# glibc would hand freed cache entries back to the system and fault them in again at the next full step.
keep := MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000
bench: .venv/.with-bench
	$(keep) $(BIN)/python -m examples.benchmark_plans compute-bound
	$(BIN)/python -m examples.benchmark_plans launch-bound --threads 1 --rounds 15
	$(BIN)/python -m examples.benchmark_plans launch-bound --threads 1 --rounds 15 --rivals
	$(BIN)/python -m examples.benchmark_overhead
	$(keep) $(BIN)/python -m examples.benchmark_fastercache --rivals --rounds 3
	$(BIN)/python -m examples.benchmark_fastercache --rivals --width 32 --model latte --presets latte
	$(BIN)/python -m examples.benchmark_video
	$(keep) $(BIN)/python -m examples.benchmark_toca

# Writes docs/benchmarks.md of the records in docs/benchmarks; any of the scripts above writes one with --json.
benchmarks-page: .venv/.with-examples
	@$(BIN)/python -m examples.benchmarks_page

# A stamp per extra; one that includes others stamps them too.
covers_test := examples bench
covers_lint := examples
covers_dev := examples test lint bench

.venv/.with-%: pyproject.toml .ci/constraints.txt | .venv/bin/pip
	@echo "Installing graphcache-dit[$*] into .venv; the first time takes minutes"
	@$(PIP) install -c .ci/constraints.txt -e '.[$*]' 2> >(grep -v '^WARNING' >&2) | sed -Eun \
	  -e 's|^Processing .*/|Processing |' -e 's/^((Collecting|Processing|Installing collected) [^ ]+).*/  \1/p'
	@touch $@ $(covers_$*:%=.venv/.with-%)

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "graphcache needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
