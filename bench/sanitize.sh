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
    status=0
    timeout "${SECONDS_EACH:-40}" "$SANITIZER" --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" tests/support/sanitizer_job.py "$provider" || status=$?
    if [ "$status" = 124 ]; then echo "not finished within its time: nothing found until then"; continue; fi
    if [ "$status" != 0 ]; then exit "$status"; fi
  done
done
