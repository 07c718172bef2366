# What a person and CI do here; `make help` lists it. Nothing but make and some Python need be there
# before: `make train` finds or fetches an interpreter, builds .venv from constraints.txt, and trains.
#
#   PYTHON=...         builds .venv with this interpreter       (ORACLE_PYTHON=... for the oracle's)
#   ARGS="..."         more arguments for train, test, test-all and bench

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The caller's environment has no say in which packages are used or where they go.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP VIRTUAL_ENV
unexport PIP_CONSTRAINT PIP_NO_BINARY PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_ROOT PIP_TARGET
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := 0
export PYTHONNOUSERSITE := 1

ARGS :=
ORACLE_PYTHON :=

PY := .venv/bin/python
STAMP := .venv/.stamp
ORACLE_PY := .venv-oracle/bin/python
ORACLE_STAMP := .venv-oracle/.stamp
AOT_STAMP := .aot/.stamp

# Compiled programs are kept between runs, in the checkout: the tests' time is mostly XLA's.
PYTEST = JAX_COMPILATION_CACHE_DIR="$${JAX_COMPILATION_CACHE_DIR:-$(CURDIR)/.cache/jax}" \
	$(PY) -m pytest -n 2 --dist worksteal

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: venv
venv: $(STAMP) ## build or update .venv (exactly constraints.txt, and this project editable)

$(STAMP): constraints.txt pyproject.toml
	@if ! { PYTHON=$(PY) .ci/find-python && $(PY) -m pip --version; } >/dev/null 2>&1; then \
		python=$$(.ci/find-python) || exit 1; \
		echo "making .venv with $$python"; \
		"$$python" -m venv --clear .venv || exit 1; \
	fi
	@echo "installing constraints.txt into .venv"
	@$(PY) -m pip install --quiet --no-deps -r constraints.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: train
train: $(STAMP) ## train the tiny preset into runs/tiny
	$(PY) -m experiments.pretrain --preset=tiny --workdir=runs/tiny $(ARGS)

.PHONY: r1zero
r1zero: $(STAMP) ## reasoning from rewards alone, in small: base, three seeds, two controls
	$(PY) -m experiments.r1zero --workdir=runs/r1zero $(ARGS)

.PHONY: test
test: $(STAMP) ## the quick tests: neither slow nor gpu
	$(PYTEST) -m "not slow and not nightly and not gpu" $(ARGS)

.PHONY: test-all
test-all: $(STAMP) ## every test that needs no accelerator nor minutes, as CI runs them
	$(PYTEST) -m "not nightly and not gpu" $(ARGS)

.PHONY: nightly
nightly: $(STAMP) ## the tests that train for minutes, one after the other
	$(PY) -m pytest -m nightly $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff: format and rules
	@failed=0; \
	$(PY) -m ruff format --check . || failed=1; \
	$(PY) -m ruff check --output-format concise . || failed=1; \
	exit $$failed

.PHONY: types
types: $(STAMP) ## pyrefly
	$(PY) -m pyrefly check --progress-bar no

.PHONY: contracts
contracts: $(STAMP) ## import-linter: the house's arrows
	.venv/bin/lint-imports --no-cache --no-logo

.PHONY: oracle
oracle: $(ORACLE_STAMP) ## build .venv-oracle (torch, transformers, TRL) and write tests/golden anew
	@for script in tests/oracle/*.py; do \
		echo "$$script"; \
		$(ORACLE_PY) "$$script" || exit 1; \
	done

$(ORACLE_STAMP): Makefile
	@if ! { PYTHON=$(ORACLE_PY) .ci/find-python 3.11 && $(ORACLE_PY) -m pip --version; } >/dev/null 2>&1; then \
		python=$$(PYTHON="$(ORACLE_PYTHON)" .ci/find-python 3.11) || exit 1; \
		echo "making .venv-oracle with $$python"; \
		"$$python" -m venv --clear .venv-oracle || exit 1; \
	fi
	@echo "installing torch, transformers and TRL into .venv-oracle"
	@$(ORACLE_PY) -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors gguf==0.19.0 \
		trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
	@touch $@

.PHONY: aot
aot: $(AOT_STAMP) ## compilers for an H100 and TPUs, into .aot (1.2 GB; .venv stays without plugins)

$(AOT_STAMP): .ci/aot-requirements.txt | $(STAMP)
	@echo "installing .ci/aot-requirements.txt into .aot"
	@rm -rf .aot
	@$(PY) -m pip install --quiet --no-deps --target .aot -r .ci/aot-requirements.txt
	@touch $@

.PHONY: kernels
kernels: $(AOT_STAMP) ## compile every kernel for them, and compare with docs/kernel_resources.json
	$(PY) -m experiments.kernel_resources $(ARGS)

.PHONY: bench
bench: $(STAMP) ## every benchmark, experiments/*bench*.py (peers run in .venv-oracle: make oracle)
	@set -- experiments/*bench*.py; \
	if [ ! -e "$$1" ]; then echo "no experiments/*bench*.py yet"; exit 0; fi; \
	for script in "$$@"; do \
		module=$$(basename "$$script" .py); \
		echo "experiments.$$module"; \
		$(PY) -m "experiments.$$module" $(ARGS) || exit 1; \
	done

.PHONY: clean
clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
