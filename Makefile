# make train: the embedded default.   make vqa-demo: the one with images.   make docs: the pages as a site.
# make test: the gate.   make test-fast: its tests that start no ranks and take little.   make test-all: every test.
# make test-gpu, make bench-gpu: what needs a GPU, each in one command (GPU_ARGS=--second: the second script).
# make dist: what a release holds, built twice, compared and checked; see release/README.md.
# make test-faults: KILLS kills of running streams, FUZZ_SECONDS of damage for every reader of files.   make venv: set-up alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Two CPU ranks where there is no GPU, so that sharding is real; one process on a GPU.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
RANKS ?= $(if $(HAS_GPU),1,2)
LAUNCH := DS_ACCELERATOR=$(if $(HAS_GPU),cuda,cpu) $(BIN)/deepspeed --num_accelerators $(RANKS)

.PHONY: train vqa-demo test test-fast test-all test-faults check bench bench-cost bench-continual \
	bench-continual-small bench-kernels test-gpu bench-gpu docs dist clean venv

train: $(VENV)/.ready
	rm -rf runs/embedded
	$(LAUNCH) launch/train.py --deepspeed ds_configs/zero2.json --output_dir runs/embedded

vqa-demo: $(VENV)/.ready
	rm -rf runs/vqa
	$(LAUNCH) launch/vqa_demo.py --deepspeed ds_configs/zero2.json --output_dir runs/vqa

# One test more at a time than there are cores, since ranks wait for each other; a single thread each: small tensors gain
# nothing by more.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1); echo $$((n > 3 ? 4 : n + 1)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test: check
	$(PYTEST)

test-fast: check
	$(PYTEST) -m "not slow and not heavy" tests/test_architecture.py tests/unit tests/ops

test-all: check
	$(BIN)/python -m pytest -m "slow or not slow"

KILLS ?= 200
FUZZ_SECONDS ?= 600

test-faults: $(VENV)/.ready
	PIECE_DS_KILLS=$(KILLS) PIECE_DS_SECONDS=36000 PIECE_DS_FUZZ_SECONDS=$(FUZZ_SECONDS) \
		$(BIN)/python -m pytest tests/faults -m "slow or not slow" -rP

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(LAUNCH) bench/overhead.py

bench-cost: $(VENV)/.ready
	DS_ACCELERATOR=$(if $(HAS_GPU),cuda,cpu) $(BIN)/python bench/cost.py --ranks $(RANKS)

# The study on a real model: hours; it resumes. TRACE=FOLDER says where the tasks are, HOURS=H when to stop.
bench-continual: $(VENV)/.ready
	DS_ACCELERATOR=$(if $(HAS_GPU),cuda,cpu) $(BIN)/python bench/continual/real/run.py $(if $(TRACE),--trace $(TRACE)) $(if $(HOURS),--hours $(HOURS))
	$(BIN)/python bench/continual/real/summary.py
	DS_ACCELERATOR=$(if $(HAS_GPU),cuda,cpu) $(BIN)/python bench/continual/real/stream.py $(if $(TRACE),--trace $(TRACE)) $(if $(HOURS),--hours $(HOURS))

# The same question on a model of a million weights that it makes itself: 19 methods over streams of six tasks.
bench-continual-small: $(VENV)/.ready
	DS_ACCELERATOR=$(if $(HAS_GPU),cuda,cpu) $(BIN)/python bench/continual/run.py $(if $(TRACE),--trace $(TRACE)) $(if $(HOURS),--hours $(HOURS))
	$(BIN)/python bench/continual/summary.py

bench-kernels: $(VENV)/.ready
	$(BIN)/python kernels/bench/run.py

# On a machine with a GPU: its ops alone, then everything that bench/gpu.sh measures; results in OUT (runs/gpu).
test-gpu: $(VENV)/.ready
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU here that torch can use")'
	$(BIN)/python -m pytest tests/ops/test_ops_cuda.py

bench-gpu: $(VENV)/.ready
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU here that torch can use")'
	PYTHON=$(CURDIR)/$(BIN)/python OUT=$(or $(OUT),$(CURDIR)/runs/gpu) bench/gpu.sh $(GPU_ARGS)

# Of the committed files.
dist: $(VENV)/.ready
	PYTHON=$(CURDIR)/$(BIN)/python release/build.sh --kernels
	$(BIN)/python release/check_wheel.py dist/*.whl

# The pages and the API as a site, in site/. The builder is installed into an environment of its own, once; then it needs no network.
docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet --site-dir site

$(VENV)-docs/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --constraint constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

venv: $(VENV)/.ready

# An installed CUDA torch is kept, with the Triton it came with: the environment sees it, and nothing may replace it.
$(VENV)/.ready: constraints.txt pyproject.toml
	if $(PYTHON) -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		$(PYTHON) -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt && \
		grep -Ev '^(torch|triton)==' constraints.txt >> $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs site runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
