# make demo    train on digits, explain, retrieve, compare: pictures and summary.json in runs/demo
# make test    all fast tests          make slow    the slow ones
# make check   format, lint, types, layers
# make bench   time and memory, against the stated limits (one of them: make bench BENCHMARKS=explaind)
# make clean   remove what runs and tools wrote (the virtual environment stays)
#
# Each target installs what it needs on its first run. Another Python: make test PYTHON=python3.12
# More for pytest: make test ARGS="-k digits"

VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p))))
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Two test processes on one thread each are faster than each of them on all threads.
BENCHMARKS ?= recording_overhead explain_speed tangent_gram adam_speed explaind fashion trainer_throughput \
	convex_bounds schedules flooding retrieval million fashion_retrieval convex svm_table alpha_independence \
	kernel_machine incremental stream
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

export MPLBACKEND := Agg

.PHONY: demo test slow bench check clean
.NOTPARALLEL:

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/kxexplain demo --out runs/demo

test: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m slow --timeout 1800 $(ARGS)

bench: $(VENV)/.installed-test $(VENV)/.installed-bench $(VENV)/.installed-peers
	for script in $(BENCHMARKS); do $(BIN)/python -m tests.benchmarks.$$script || exit 1; done

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf runs dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find kxexplain tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file per set of extras: installed again when the dependencies change, else not.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

# Libraries to be measured against, without their dependencies (the file says why).
$(VENV)/.installed-peers: tests/benchmarks/peers.txt | $(BIN)/python
	$(PIP) --no-deps -r $<
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[$*]"
	touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "kxexplain needs Python 3.11 or newer: install it, or name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
