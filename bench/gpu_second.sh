# What is open since the first call on a GPU, in at most 540 s; sourced by bench/gpu.sh --second.

# ---- correctness of what has changed, side by side ----
aside ops 150 $PYTHON -m pytest -q -n ${TEST_WORKERS:-6} --dist worksteal -p no:cacheprovider tests/ops/test_ops_cuda.py -k "not more_elements"
aside repeat 120 $PYTHON bench/gpu_repeat.py
aside e2e 150 $PYTHON bench/gpu_e2e.py "$WORK/e2e" --lanes 2 --seconds 100 --stages 2 3
for tool in memcheck racecheck; do
  aside "sanitize-$tool" 120 env TOOLS=$tool PROVIDERS=cuda SECONDS_EACH=110 bench/sanitize.sh
done
gather
[ -f "$WORK/e2e/e2e.json" ] && cp "$WORK/e2e/e2e.json" "$OUT/e2e.json"

# ---- selection, lists, sampled gradients: both providers ----
part "kernel table" 110 $PYTHON kernels/bench/run.py --sizes 10000000 50000000 1000000000 --adamw_sizes 1000000000 --rounds 7 \
  --no_compile --output "$OUT/kernels.csv" --ops selection filter_ score_histogram_ select_above mask_to_index apply_mask_ \
  apply_mask_list_ scatter_list_ gather_add_ sampled_gradient_
cp piece_ds/ops/sampled_gradients.csv "$OUT/sampled_gradients.csv"
part "when a sampled gradient pays" 60 $PYTHON kernels/bench/gradient_table.py --output "$OUT/sampled_gradients.csv"

# ---- steps ----
part "overhead" 60 "${one_rank[@]}" $PYTHON bench/overhead.py \
  --output "$OUT/overhead.csv" --hidden 4096 --layers 2 --vocab 32000 --tokens 1024 --rows 1 --repeats 7 --stages 2 3 --dtypes bf16
llama() { local name=$1 limit=$2; shift 2; part "$name" "$limit" $PYTHON bench/cost.py --shape llama3-8b --in_turn --ranks 1 --dtypes bf16 "$@"; }
llama "cost, Llama-3-8B" 190 --zero none 3 2 --methods compact lora compact-dense --workloads 2x256 2x2048 2x2048c --repeats 3 \
  --seconds 65 --output "$OUT/cost.csv"
part "where a compact step goes" 30 $PYTHON bench/gpu_step.py
part "where a compact step at ZeRO-3 goes" 40 "${one_rank[@]}" $PYTHON bench/gpu_step.py --zero 3
llama "cost, ways to fetch" 60 --zero 3-ahead 3-granular --methods compact --repeats 5 --seconds 25 --output "$OUT/cost-fetching.csv"
