#!/usr/bin/env bash
# Runs the Rust tests of every crate but the Python binding, which links only into an interpreter and
# is tested from there. Uses nextest where it is installed: one process per test. Ends with what was
# skipped: a test that lacks something prints `skipped: ` and what it lacks.
set -euo pipefail
cd "$(dirname "$0")/.."
crates=(--workspace --exclude anyfabric-python)

# Debian's libfabric is older than the wheel's, which is tested below, and has limits of its own.
if [[ $(ldconfig -p 2>/dev/null) != *'libfabric.so.1 '* ]]; then
  install=(apt-get install --yes --no-install-recommends libfabric1)
  export DEBIAN_FRONTEND=noninteractive
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo 'not tested: a libfabric of the system; install libfabric1 (Debian, Ubuntu)'
  elif ! { "${install[@]}" || { apt-get update && "${install[@]}"; }; } >/dev/null 2>&1; then
    echo 'not tested: a libfabric of the system; libfabric1 could not be installed'
  fi
fi

# Shows what failed, and of what went well only why it was skipped.
list_skipped() {
  awk '
    /^successes:$/ { quiet = 1 }
    /^(failures:$|test result:)/ { quiet = 0 }
    /^---- .* stdout ----$/ { test = $2 }
    /^skipped: / { skipped[++num_skipped] = test ": " substr($0, 10) }
    !quiet { print; fflush() }
    END {
      if (num_skipped) print "skipped Rust tests:"
      for (idx = 1; idx <= num_skipped; idx++) print "  " skipped[idx]
    }'
}

if cargo nextest --version >/dev/null 2>&1; then
  # Most tests wait for most of their time: half as many again as there are cores.
  cargo nextest run "${crates[@]}" --no-fail-fast --status-level retry --final-status-level skip \
    --test-threads $(($(nproc) * 3 / 2))
  cargo test --quiet "${crates[@]}" --doc
else
  cargo test --quiet "${crates[@]}" -- --show-output 2>&1 | list_skipped
fi
# Once more over the libfabric that the wheel mpich brings: what ran above took the system's, where there is one.
wheel=$PWD/.venv/lib/mpich/libfabric.so.1
if [ -e "$wheel" ]; then
  ANYFABRIC_LIBFABRIC_LIBRARY=$wheel cargo test --quiet -p anyfabric-engine --test conformance libfabric
fi
# The suite proves itself: every deliberate mistake is caught.
cargo test --quiet -p anyfabric-engine --features mutants --test simulation --test conformance mutants::
