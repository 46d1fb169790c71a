"""A job: compact mode, a backward that fails half-way or is not wanted, zero_grad(), and on; for test_discarded.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds import attach, layout_of, prepare_compact, select
from support.engines import Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model

NUM_STEPS, ACCUMULATION = 3, 2


def main() -> None:
    start()
    results: Results = {}
    for stage in (0, 2, 3):
        for name, disturb in DISTURBED.items():
            collect_case(results, f"{name} {stage}", partial(trained, stage, disturb))
    finish(results)


class _Failure(Exception):
    pass


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise _Failure


def fail_in_backward(engine: Any, batch: dict[str, Tensor]) -> None:
    """The layers above the first one have added their gradients when it fails."""
    handle = engine.module.model.layers[0].register_forward_hook(lambda *args: _Fails.apply(args[2]))
    loss = engine(**batch).loss
    handle.remove()
    try:
        engine.backward(loss)
    except _Failure:
        engine.zero_grad()
        return
    raise AssertionError("backward did not fail")


def discard_by_optimizer(engine: Any, batch: dict[str, Tensor]) -> None:
    engine.backward(engine(**batch).loss)
    engine.optimizer.zero_grad()


DISTURBED: dict[str, Callable[[Any, dict[str, Tensor]], None] | None] = {
    "left alone": None,
    "a backward failed": fail_in_backward,
    "discarded by the optimizer": discard_by_optimizer,
}


def trained(stage: int, disturb: Callable[[Any, dict[str, Tensor]], None] | None) -> dict[str, Any]:
    """Weights after steps of two micro-batches each; before the second step something is thrown away."""
    model = make_model("llama")
    prepare_compact(model, 0.05)
    engine = make_engine(model, Setup(stage), adamw(model), ACCUMULATION)
    update = attach(engine, select(layout_of(engine.module), "random", 0.05))
    own_zero_grad = "zero_grad" in vars(engine)
    batches = make_micro_batches(num=2 * NUM_STEPS * ACCUMULATION)[dist.get_rank() :: dist.get_world_size()]
    for number, batch in enumerate(batches):
        if number == ACCUMULATION and disturb is not None:
            disturb(engine, batches[0])
        engine.backward(engine(**batch).loss)
        engine.step()
    update.detach()
    left = "zero_grad" in {**vars(engine), **vars(engine.optimizer)}
    return {"weights": whole_weights(engine), "wrapped": own_zero_grad, "left": left}


if __name__ == "__main__":
    main()
