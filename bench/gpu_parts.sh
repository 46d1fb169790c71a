# What the scripts for a GPU share; sourced by bench/gpu.sh. A part that fails, or runs out of time, is named at the end and
# does not keep the others from running; what each has written by then is in $OUT.
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/runs/gpu}
WORK=${WORK:-/tmp/piece_gpu}
BUDGET=${BUDGET:-560}
mkdir -p "$OUT" "$WORK"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # carried packages stay importable
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_IB_DISABLE=1  # one machine, perhaps without a network
# nvcc on the path may be a wrapper that lies elsewhere: torch looks for headers beside it.
if [ -z "${CUDA_HOME:-}" ]; then
  top=$( (command -v nvcc >/dev/null && nvcc -v -E -x cu /dev/null 2>&1 || /usr/local/cuda/bin/nvcc -v -E -x cu /dev/null 2>&1) \
    | sed -n 's/^#\$ TOP=//p' | head -n 1)
  [ -n "$top" ] && CUDA_HOME=$(cd "$top" && pwd) && export CUDA_HOME
fi
[ -n "${CUDA_HOME:-}" ] && export PATH=$PATH:$CUDA_HOME/bin
exec > >(tee "$OUT/log.txt") 2>&1
started=$SECONDS
failed=()

# PARTS: a regular expression; only the parts whose names match it run.
wanted() { [[ $1 =~ ${PARTS:-.} ]]; }
left() { echo $((BUDGET - (SECONDS - started))); }
# part NAME LIMIT COMMAND...: its output in the log, its end and its time too.
part() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  wanted "$name" || return 0
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then failed+=("$name (no time)"); return; fi
  echo "== $name (at $((SECONDS - started)) s, at most $limit s)"
  timeout --kill-after 5 "$limit" "$@" || failed+=("$name ($?)")
  echo "== $name: $((SECONDS - begin)) s"
}
# aside NAME LIMIT COMMAND...: beside others; its output when it has ended.
names=() pids=()
aside() {
  local name=$1 limit=$2
  shift 2
  wanted "$name" || return 0
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then failed+=("$name (no time)"); return; fi
  timeout --kill-after 5 "$limit" "$@" >"$WORK/$name.log" 2>&1 &
  names+=("$name") pids+=($!)
}
gather() {
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || failed+=("${names[$i]} ($?)")
    echo "== ${names[$i]} (beside others; done by $((SECONDS - started)) s)"
    tail -n "${TAIL:-70}" "$WORK/${names[$i]}.log"
  done
  names=() pids=()
}
# finish: what failed, and whether nothing did.
finish() {
  echo "failed: ${failed[*]:-nothing} (after $((SECONDS - started)) s)"
  [ ${#failed[@]} -eq 0 ]
}

facts() {
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,clocks.max.mem --format=csv
  echo "CUDA_HOME=${CUDA_HOME:-none} nvcc=$(command -v nvcc) sanitizer=$(command -v compute-sanitizer) OUT=$OUT cores=$(nproc)"
  $PYTHON - <<'PY'
import importlib.metadata as m, sys, torch
names = ("torch triton deepspeed transformers accelerate peft datasets numpy pydantic safetensors tokenizers").split()
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "absent"
print(sys.version.split()[0], {name: version(name) for name in names}, torch.__version__)
PY
}

# Kernels taken as carried, or built. Without nvcc's the rest is still worth having with Triton's.
providers() {
  PARTS=. part "build and providers" 150 $PYTHON -m piece_ds.ops
  if [ ${#failed[@]} -ne 0 ]; then export PIECE_DS_BACKEND=triton; echo "going on with PIECE_DS_BACKEND=triton"; fi
}

# A process group of one, without a launcher.
one_rank=(env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29777)
