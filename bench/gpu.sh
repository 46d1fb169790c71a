#!/usr/bin/env bash
# Everything that needs a GPU, in one call of about 8 minutes on an H200: op correctness on CUDA and Triton, sanitizers, the
# kernel table, what PIECE adds to a step, and the cost of methods at Llama-3-8B's shape with random weights.
# Results go to kernels/bench/results/ and bench/results/ and, where OUT is set, there too. Needs torch with CUDA, nvcc,
# deepspeed and this folder. A part that fails is named at the end and does not keep the others from running.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
failed=()
part() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name")
}
nvidia-smi -L
part "build and providers" 150 $PYTHON -m piece_ds.ops
part "ops on the GPU" 120 $PYTHON -m pytest -q tests/ops/test_ops_cuda.py
part "kernel table" 120 $PYTHON kernels/bench/run.py --sizes 1000000 50000000 1000000000 --adamw_sizes 50000000 1000000000 \
  --rounds 11 --no_compile
part "kernel table, torch.compile" 60 $PYTHON kernels/bench/run.py --sizes 50000000 --adamw_sizes --rounds 11 --providers cuda \
  --output kernels/bench/results/compile.csv
# Llama-3-8B's layers (hidden 4096, vocabulary 128256), as many as fit one GPU with fp32 masters and moments.
part "overhead" 90 $PYTHON -m deepspeed.launcher.runner --num_gpus "${GPUS:-1}" bench/overhead.py \
  --hidden 4096 --layers 4 --vocab 128256 --tokens 1024 --rows 1 --repeats 9 --stages 2 3 --dtypes bf16
part "cost" 180 $PYTHON bench/cost.py --shape llama3-8b --apart --ranks "${GPUS:-1}" --dtypes bf16 --zero none 3 --repeats 5
part "sanitizers" 120 env SECONDS_EACH=20 bench/sanitize.sh
if [ -n "${OUT:-}" ]; then cp bench/results/*.csv kernels/bench/results/*.csv "$OUT"/; fi
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
