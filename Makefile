# Two commands do everything: `make demo` (the main job) and `make test`. Each sets up .venv first; a second run is fast.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs
RELEASE_STAMP := $(VENV)/.release
# The oldest Triton that is supported: the machine code of the kernels is looked at with both.
OLD_TRITON := build/triton-3.6
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-slow lint docs sanitize wheels hub bench gpu format clean help

help:
	@echo "make demo      set up .venv, then show what compression costs and gives; tables and pictures in demo/"
	@echo "make test      set up .venv, then run the tests"
	@echo "make test-slow the tests that compile and install for minutes, which make test leaves out"
	@echo "make lint      ruff (lint and format), clang-format and mypy"
	@echo "make docs      the documentation as a site, in build/site"
	@echo "make sanitize  the tests of the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make wheels    the source distribution and the wheels, checked, in dist/ (KINDS=\"pure cpu cuda\" chooses)"
	@echo "make hub       the kernel for the hub, in build/hub (KINDS=\"universal cpu cuda\" chooses)"
	@echo "make bench     all kernels against eager PyTorch and tomesd; rows and plots in benchmarks/results/"
	@echo "make gpu       on a machine with a GPU, without .venv: tests, sanitizer, benchmarks; all in gpu/ (TUNE=1, MODELS=1 add parts)"
	@echo "make format    let ruff and clang-format rewrite the files"
	@echo "make clean     remove .venv, demo/ and build products"

$(STAMP): pyproject.toml requirements.txt setup.py $(wildcard csrc/*.py csrc/*.h csrc/cpu/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "PYTHON: got Python %d.%d, expected 3.11 to 3.13 (diffusers 0.42 and triton 3.9 need 3.11); try: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/bigain demo --out demo --overwrite

$(OLD_TRITON): | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

# Dozens of processes of the tests import the package: compiled once, also where Python is told to keep no bytecode.
test test-slow sanitize: export PYTHONDONTWRITEBYTECODE =
test: $(STAMP) $(OLD_TRITON)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --slow no

test-slow: $(STAMP) $(OLD_TRITON) $(RELEASE_STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --slow only

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

$(DOCS_STAMP): $(STAMP) docs/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	@touch $@

# The variable silences an advertisement of the theme, which is no warning of ours.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(RELEASE_STAMP): $(STAMP) release/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement release/requirements.txt
	@touch $@

wheels: $(RELEASE_STAMP)
	$(BIN)/python -m release.wheels $(KINDS)

hub: $(RELEASE_STAMP)
	$(BIN)/python -m release.hub $(KINDS)

sanitize: $(STAMP)
	$(BIN)/python csrc/sanitize.py --numprocesses 2 --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --out benchmarks/results

# No .venv: the Python of the machine has the torch and the Triton that fit its GPU. Nothing is fetched.
gpu:
	$(PYTHON) -m benchmarks.gpu --out gpu $(if $(TUNE),--tune) $(if $(MODELS),--models)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) demo build dist *.egg-info bigain_kernels/_native*
