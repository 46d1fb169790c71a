#!/usr/bin/env bash
# compute-sanitizer over every op of both CUDA providers: accesses out of bounds, races in shared memory, bad barriers.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
export PYTHONPATH=$PWD:$PWD/tests/support PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck; do
  for provider in cuda triton; do
    echo "== $tool $provider"
    # Torch's own kernels are not watched: only ours have these words in their names.
    timeout "${SECONDS_EACH:-60}" "$SANITIZER" --tool "$tool" --error-exitcode 9 --target-processes all \
      --kernel-name regex=_kernel "$PYTHON" tests/support/sanitizer_job.py "$provider"
  done
done
