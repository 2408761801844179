#!/usr/bin/env bash
# Runs the Rust tests of every crate but the Python binding, which links only into an interpreter and
# is tested from there. Uses nextest where it is installed: one process per test.
set -euo pipefail
cd "$(dirname "$0")/.."
crates=(--workspace --exclude anyfabric-python)
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run "${crates[@]}" --no-fail-fast --status-level fail --final-status-level skip
  cargo test --quiet "${crates[@]}" --doc
else
  cargo test --quiet "${crates[@]}"
fi
# The suite proves itself: every deliberate mistake is caught.
cargo test --quiet -p anyfabric-engine --features mutants --test simulation --test conformance mutants::
