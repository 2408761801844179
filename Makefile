# Everything a developer or CI types. Each target can run on a fresh checkout: it makes what it needs, once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first Python of these that is 3.10 or later; `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do \
  command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && \
  { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

RUST_SOURCES := $(shell find crates -name '*.rs' -o -name Cargo.toml 2>/dev/null) Cargo.toml Cargo.lock

# Wheels may lie in a folder that only pip was told about.
ifneq ($(wildcard $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
# Cargo may have been installed a minute ago, by a shell that is still open.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(STAMPS)/demo $(STAMPS)/native ## Stream a transformer's KV cache from a prefill to a decode process
	@$(BIN)/anyfabric demo kv $(ARGS)

.PHONY: test
test: $(STAMPS)/test $(STAMPS)/demo $(STAMPS)/native ## Run every test that needs no RDMA NIC; end with what was skipped, and why
	@tools/test_rust.sh
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: test-rdma
test-rdma: tools-present $(STAMPS)/native ## Run the RDMA tests in a virtual machine with Soft-RoCE NICs; installs qemu where it can
	@$(BIN)/python tests/rdma/run.py $(ARGS) || { code=$$?; test $$code = 77 || exit $$code; }

.PHONY: check
check: $(STAMPS)/check $(STAMPS)/native ## Formatters, linters, types, the stub, the layers, the docs
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	cargo clippy --quiet -p anyfabric-engine --features mutants --all-targets -- -D warnings
	$(BIN)/python tools/crate_graph.py
	$(BIN)/ruff format --quiet --check $(PYTHON_FOLDERS)
	$(BIN)/ruff check --quiet $(PYTHON_FOLDERS)
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m mypy.stubtest anyfabric._core --allowlist tools/stubtest_allowlist.txt
	$(BIN)/lint-imports --no-logo --config pyproject.toml
	$(BIN)/python tools/budgets.py
	$(MAKE) --no-print-directory docs

PYTHON_FOLDERS = $(wildcard python tests tools examples benchmarks)

.PHONY: bench
bench: $(STAMPS)/native ## Measure every transport and operation beside its baselines
	@$(BIN)/anyfabric perf $(ARGS)

.PHONY: bench-peers
bench-peers: $(STAMPS)/native ## Measure NIXL, Mooncake and UCX beside us, in a venv of their own
	@$(MAKE) --no-print-directory -C benchmarks/peers run

.PHONY: bench-posting
bench-posting: $(STAMPS)/build tools-present ## Measure our own cost of a work request, in time and (valgrind) instructions
	@$(BIN)/python -m benchmarks.posting $(ARGS)

.PHONY: bench-table
bench-table: $(STAMPS)/build ## Render the newest records into README.md and docs/benchmarks.md
	@$(MAKE) --no-print-directory -C benchmarks/peers table
	@$(BIN)/python -m benchmarks.posting --table

.PHONY: docs
docs: $(STAMPS)/check ## Build the API reference from the docstrings into docs/_build
	@$(BIN)/python tools/build_docs.py docs/_build

FUZZ_S ?= 60

.PHONY: fuzz
fuzz: tools-present ## Fuzz the wire decoder for FUZZ_S seconds (60)
	@cargo run --quiet --release -p anyfabric-wire --example fuzz -- --seconds $(FUZZ_S) $(ARGS)

.PHONY: clean
clean: ## Remove what make made, the compiled crates included
	rm -rf $(VENV) docs/_build target python/anyfabric/_core*.so

# What has been installed is recorded by stamps: a second call does nothing.

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo 'Python 3.10 or later is missing: install python3 and python3-venv' >&2; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV) || { echo 'cannot make a venv: install python3-venv (Debian, Ubuntu)' >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/venv constraints.txt pyproject.toml
	@$(UV) --group build numpy click rich
	@touch $@

$(STAMPS)/test: $(STAMPS)/build
	@$(UV) --group test
	@touch $@

$(STAMPS)/check: $(STAMPS)/build
	@$(UV) --group check
	@touch $@

# The CPU build of torch is a tenth of the size; the index that has it is not reachable everywhere.
$(STAMPS)/demo: $(STAMPS)/build
	@echo 'installing torch and transformers (large, once)'
	@$(UV) --torch-backend cpu torch==$(TORCH) 2>/dev/null || $(UV) torch==$(TORCH)
	@$(UV) transformers safetensors
	@touch $@

TORCH := $(shell sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: tools-present
tools-present:
	@command -v cargo >/dev/null && command -v rustc >/dev/null || { \
	  echo 'Rust is missing: install rustup (https://rustup.rs), then run `rustup default stable`; 1.89 or later' >&2; exit 1; }
	@command -v cc >/dev/null || { echo 'a C compiler is missing: install gcc (Debian, Ubuntu: build-essential)' >&2; exit 1; }

$(STAMPS)/native: $(STAMPS)/build $(RUST_SOURCES) pyproject.toml | tools-present
	@echo 'building the native module (some minutes the first time)'
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/maturin develop --quiet --release --uv
	@touch $@
