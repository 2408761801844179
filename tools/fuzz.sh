#!/usr/bin/env bash
# Fuzzes the wire decoder for the given number of seconds with cargo-fuzz; without it, which needs a
# nightly compiler, runs the property tests of the same decoder with as many cases as fit.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
if [ -d fuzz ] && cargo fuzz --version >/dev/null 2>&1 && rustc --version | grep -q nightly; then
  exec cargo fuzz run decode -- -max_total_time="$seconds"
fi
echo "cargo-fuzz with a nightly compiler is not installed: running the property tests for $seconds s instead" >&2
end=$((SECONDS + seconds))
rounds=0
while [ "$SECONDS" -lt "$end" ]; do
  PROPTEST_CASES=20000 cargo test --quiet --release -p anyfabric-wire
  rounds=$((rounds + 1))
done
echo "$rounds rounds, nothing found"
