#!/usr/bin/env bash
# Everything that needs a GPU, in one call: op correctness on CUDA, then what PIECE adds at Llama-3-8B's layer shapes.
# Results go to bench/results/ and, where OUT is set, there too. Needs torch with CUDA, deepspeed and this folder.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
nvidia-smi -L
$PYTHON -m piece_ds.ops
# The first run compiles the CUDA provider, a minute or so.
$PYTHON -m pytest -q tests/ops/test_ops_cuda.py tests/ops/test_compile.py
# Llama-3-8B's layers (hidden 4096, vocabulary 128256), as many as fit one GPU with fp32 masters and moments.
$PYTHON -m deepspeed.launcher.runner --num_gpus "${GPUS:-1}" bench/overhead.py \
  --hidden 4096 --layers 4 --vocab 128256 --tokens 1024 --rows 1 --repeats 15 --stages 2 3 --dtypes bf16
if [ -n "${OUT:-}" ]; then cp bench/results/*.csv "$OUT"/; fi
bench/sanitize.sh
