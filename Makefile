# Two commands: `make demo` and `make test`. Each makes its own environment first, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs benchmarks clean help

help:
	@echo "make demo        train, compress and report a small network (under a minute)"
	@echo "make test        run the tests"
	@echo "make lint        ruff, mypy, import contracts"
	@echo "make docs        write the pages of methods from their docstrings"
	@echo "make benchmarks  run the long experiments that are missing"
	@echo "make clean       delete the environment and caches"

demo: $(STAMP)
	$(RUN) -m lilliput demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP)
	$(RUN) docs/generate.py

benchmarks: $(STAMP)
	$(RUN) benchmarks/run.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment: torch first and from constraints.txt, because a newer one brings gigabytes of CUDA.
# Python compiles what is imported when it is imported; to compile all that is installed takes longer than the demo.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lilliput needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt torch || \
	  { echo "torch could not be installed: is a package registry within reach? constraints.txt names the version."; exit 1; }
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
