# Everything runs in a virtual environment of its own, .venv (VENV=… for another), made from the newest Python that fits.
#   make demo     the whole thing on this machine, with an embedded NATS; prints a URL worth opening
#   make test     type check, lint, format check, and the tests with their coverage
#   make check    the first three of these;  make format  puts the format right
#   make bench    beside others, on this machine;  make chaos  breaks everything for ten minutes
#   make soak     2,000 clients come and go for half an hour;  make fuzz  made-up requests and bytes for another
#   make recovery  the figures of coming back: after kill -9, from far back, all at once
# Tests mostly wait (for deadlines, processes, a browser). JOBS=2 runs two files at once, which is faster; the times that
# some of them measure then mean less, so it is one by default.
SHELL := /bin/bash
JOBS ?= 1
AT_ONCE := $(if $(filter-out 1,$(JOBS)),--numprocesses=$(JOBS) --dist=loadfile)
VENV ?= .venv
BIN := $(VENV)/bin
VERSION_TESTS := $(patsubst %,tests/test_%.py,wire outages stream broadcaster seam history sse discovery settings connection \
  connection_http2 deadline pinned_insides nats_connection nats_feed jetstream backlog publisher listener resources server books fuzzing_bytes)
CODE := sse_trio tests examples benchmarks
# Ruff has the rest of flake8-async; these are the rules about cancellation that it lacks.
CANCELLATION_RULES := ASYNC101,ASYNC102,ASYNC103,ASYNC104,ASYNC112,ASYNC113,ASYNC118,ASYNC119,ASYNC120,ASYNC121,ASYNC300

# The first of these that runs and is of a version that pyproject.toml allows. (Version managers leave names that fail.)
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3 python,$(shell $(p) -c '$(FITS)' >/dev/null 2>&1 && echo $(p))))

.PHONY: demo test versions modes check format bench recovery chaos soak fuzz clean tools
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	@exec $(BIN)/sse-trio demo $(DEMO)

test: check tools
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest $(AT_ONCE) $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What differs between Pythons, and between Quart-Trio 0.12 and 0.13: for the other versions, after `make test` on one.
versions: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(AT_ONCE) $(VERSION_TESTS) $(PYTEST)

# The same without what makes it fast, where that is another way through: SSE_DIRECT_WRITES does it for any target.
MODE_TESTS := $(patsubst %,tests/test_%.py,wire stream broadcaster seam books)
modes: $(VENV)/dev.stamp
	SSE_DIRECT_WRITES=single $(BIN)/python -m pytest $(AT_ONCE) $(MODE_TESTS) $(PYTEST)
	SSE_DIRECT_WRITES=off $(BIN)/python -m pytest $(AT_ONCE) $(MODE_TESTS) $(PYTEST)

check: $(VENV)/dev.stamp
	$(BIN)/mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/flake8-async --enable=$(CANCELLATION_RULES) $$(find $(CODE) -name '*.py')

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

tools: $(VENV)/dev.stamp
	$(BIN)/python tests/provision.py

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks $(BENCH)

recovery: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.recovery $(RECOVERY)

chaos: $(VENV)/dev.stamp tools
	$(BIN)/python tests/chaos.py $(CHAOS)

soak: $(VENV)/dev.stamp
	$(BIN)/python tests/soak.py $(SOAK)

# So many seconds for requests without tokens, for requests with tokens, and for bytes.
FUZZ ?= 600
FUZZ_SEED ?= $(shell date +%s)
fuzz: $(VENV)/dev.stamp
	FUZZ_SECONDS=$(FUZZ) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 \
	  tests/test_fuzzing.py tests/test_fuzzing_bytes.py $(PYTEST)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "sse-trio needs Python 3.11, 3.12 or 3.13 with venv: none was found (PYTHON=… names one)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/demo.stamp
