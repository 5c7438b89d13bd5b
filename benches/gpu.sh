#!/usr/bin/env bash
# On a machine with an NVIDIA card and the CUDA toolkit: builds with the feature `cuda`, holds the card's results against the
# CPU's, measures, and writes benches/RESULTS-gpu.md.
# usage: benches/gpu.sh [MODEL]    MODEL as `policy.model`; the default one if it is not given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 1
}
command -v nvidia-smi >/dev/null || fail 'there is no nvidia-smi, hence no NVIDIA card'
command -v nvcc >/dev/null || fail 'there is no nvcc: the CUDA toolkit is needed to build'
card=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | head -n 1)
[ -n "$card" ] || fail 'nvidia-smi names no card'

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)

export GYROSTAT_POLICY__DEVICE=cuda GYROSTAT_POLICY__MODEL="${1:-default}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# Both in release, so that the card's kernels are compiled once.
cargo test --locked --release --features cuda --lib -- policy::card policy::tests::tensors::card --nocapture 2>&1 | tee "$out/tests"
if grep -q 'skipped: no CUDA device' "$out/tests"; then fail 'no CUDA device answered the tests'; fi
passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$out/tests")
[ "${passed:-0}" -gt 0 ] || fail 'there were no tests'

cargo build --locked --release --features cuda --bin gyrostat
for what in serve train ppo; do
    target/release/gyrostat bench "$what" | tee "$out/$what"
done

{
    printf '# Results on a card\n\n'
    printf 'Written by `benches/gpu.sh`; the figures of the CPU are in RESULTS.md.\n\n'
    printf -- '- Card: %s\n' "$card"
    printf -- '- Model: `%s`, in bf16; adapters and their optimiser in f32\n' "$GYROSTAT_POLICY__MODEL"
    printf -- '- Commit: %s, %s\n' "$commit" "$(date -u +%F)"
    printf -- '- Tests that hold the card against the CPU: %s passed\n\n' "$passed"
    printf 'The share of the card is that of four operations for each frozen parameter and token, in the rate of plain products of\n'
    printf 'large matrices of the same type that the same run measured.\n'
    for what in serve train ppo; do
        printf '\n## bench %s\n\n```\n' "$what"
        cat "$out/$what"
        printf '```\n'
    done
} >"$out/results"
mv "$out/results" benches/RESULTS-gpu.md
printf 'benches/RESULTS-gpu.md is written\n'
