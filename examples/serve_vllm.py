"""Several tasks on one running vLLM engine: patches go on and off between requests, checked against the base.

    piece_ds delta export RUN/00-law --format vllm --model MODEL --output law.safetensors      # one patch a task
    python examples/serve_vllm.py MODEL law.safetensors med.safetensors --prompts ROWS.jsonl --output answers.json

Needs vllm (tried with 0.32 on a CPU), torch and safetensors in the environment; piece_ds is not imported. vLLM's own
loader writes the patches (model_loader/checkpoint_weight_patch.py), so names, fused layers and tensor parallelism are
its affair. Before the first write, the same loader compares the engine's weights with what the patch says they were.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# Functions are sent to the workers, which vLLM allows only if asked.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

Values = dict[str, tuple[tuple[int, ...], torch.Tensor, torch.Tensor]]  # name -> shape, flat positions, values


class Task:
    """A patch: what a task's weights are, and what they were.

    Attributes:
        name: of its file.
        values, previous: by tensor.
    """

    def __init__(self, path: Path) -> None:
        """Read a file of `piece_ds delta export --format vllm`. Raise SystemExit if it has no previous values."""
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["full_shapes"])
            if f"{next(iter(shapes))}.previous" not in set(file.keys()):
                raise SystemExit(f"error: {path} has no previous values: export a delta that has them")
            self.name = path.stem
            self.values, self.previous = (
                {
                    name: (tuple(shape), file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.{part}"))
                    for name, shape in shapes.items()
                }
                for part in ("values", "previous")
            )


class Engine:
    """A running engine and the task that is on it; None is the base."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm import LLM
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.platforms import current_platform

        # On a CPU vLLM packs linear weights for oneDNN and drops the originals, which no loader can patch afterwards.
        self.is_cpu = current_platform.is_cpu()
        if self.is_cpu:
            LinearBase._cpu_skip_gemm_dispatch = True
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the line above reaches the worker
        self.llm = LLM(model, **options)
        self.task: Task | None = None

    def check(self, task: Task) -> int:
        """Return how many weights of the engine, which is at its base, are not what the task was trained on."""
        return sum(self.llm.apply_model(partial(count_other, values=task.previous)))

    def switch(self, task: Task | None) -> float:
        """Put a task on, and the one before it off; None goes back to the base. Return the seconds.

        No request may be running. Raises SystemExit, with nothing written, if the task is of another base.
        """
        begin = time.perf_counter()
        new = {} if task is None else task.values
        unpackable = [name for name in new if self.is_cpu and name.split(".")[-2] in ("lm_head", "embed_tokens")]
        if unpackable:
            raise SystemExit(
                f"error: {task.name} changes {unpackable[0]}, which vLLM packs on a CPU: serve the merged model"
            )
        if self.task is None and task is not None and (num_other := self.check(task)):
            raise SystemExit(
                f"error: {task.name} is of another base: {num_other} weights are not what it was trained on"
            )

        # One write: what the last task changed and this one does not goes back, the rest becomes this one's.
        old = {} if self.task is None else self.task.previous
        self.llm.apply_model(partial(write, values=overlaid(old, new)))
        self.llm.reset_prefix_cache()  # keys and values of the other task's weights
        self.task = task
        return time.perf_counter() - begin


def overlaid(old: Values, new: Values) -> Values:
    """Return old with new over it: at positions of both, new's values."""
    both = dict(old) | dict(new)
    for name in old.keys() & new.keys():
        shape, positions, values = old[name]
        kept = ~torch.isin(positions, new[name][1])
        both[name] = (
            shape,
            torch.cat([positions[kept], new[name][1]]),
            torch.cat([values[kept], new[name][2]]),
        )
    return both


def write(model: torch.nn.Module, values: Values) -> None:
    """Write values into a model of vLLM, by its own loader. Runs in every worker."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    patches = [
        CheckpointWeightPatch(name=name, shape=shape, dtype=new.dtype, values=new, indices=positions)
        for name, (shape, positions, new) in values.items()
    ]
    load_checkpoint_weight_patches(model, patches)


@torch.no_grad()
def count_other(model: torch.nn.Module, values: Values) -> int:
    """Return how many of a model's weights are not these values. Runs in every worker; nothing is written.

    vLLM's loader finds the place of each tensor; its last step, copy_, is replaced by a comparison meanwhile.
    """
    num_other = 0

    def compare(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        nonlocal num_other
        expected = source.to(destination.device, destination.dtype)
        num_other += int(((destination != expected) & ~expected.isnan()).sum())
        return destination

    for name, (shape, positions, old) in values.items():
        whole = torch.full((positions.new_tensor(shape).prod().item(),), float("nan"), dtype=old.dtype)
        whole[positions.long()] = old
        with copying_replaced(compare):
            model.load_weights([(name, whole.view(shape))])
    return num_other


@contextmanager
def copying_replaced(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Make Tensor.copy_ another function, for as long as the block lasts."""
    original, torch.Tensor.copy_ = torch.Tensor.copy_, function  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.copy_ = original  # type: ignore[method-assign]


def main() -> None:
    """Answer prompts at the base, at every task in turn, and at the base again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("patches", nargs="*", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a prompt a row")
    parser.add_argument("--max_model_len", type=int, default=512, help="tokens of a prompt and its answer")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True, help="JSON: greedy tokens of every prompt, and seconds")
    arguments = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in arguments.prompts.read_text().splitlines()]
    tasks = [Task(path) for path in arguments.patches]

    length = arguments.max_model_len
    # Greedy, and the same batches for every task.
    engine = Engine(arguments.model, dtype="bfloat16", enforce_eager=True, max_model_len=length, max_num_seqs=64)
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)

    def tokens() -> list[list[int]]:
        return [list(found.outputs[0].token_ids) for found in engine.llm.generate(prompts, greedy, use_tqdm=False)]

    answers, seconds = {"base": tokens()}, {}
    for task in tasks:
        seconds[task.name] = engine.switch(task)
        answers[task.name] = tokens()
    if tasks:
        # Each switch again, now that everything is warm and nothing is checked.
        seconds |= {f"{task.name}, again": engine.switch(task) for task in tasks}
        seconds["base"] = engine.switch(None)
        answers["base again"] = tokens()
    arguments.output.write_text(json.dumps({"tokens": answers, "seconds": seconds}))
    for name, found in seconds.items():
        print(f"switched to {name} in {1000 * found:.0f} ms")


if __name__ == "__main__":
    main()
