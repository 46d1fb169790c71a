"""A job: statistics and masked steps of models that use a weight in several blocks; for test_second_uses.py."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from piece_ds import attach, collect_statistics
from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.zero import statistics
from support.engines import Setup, adamw, make_engine
from support.jobs import Results, collect_case, finish, start
from support.second_uses import CHECKPOINTING, WIDTH, Uses, language_model
from support.statistics_job import whole

NUM_BATCHES = 3


class WithLoss(nn.Module):
    """A model whose output has a loss, as the engine wants it."""

    def __init__(self, use: str, checkpointing: str) -> None:
        super().__init__()
        self.inlet = nn.Linear(WIDTH, WIDTH)  # so that the inputs of the blocks require a gradient
        self.uses = Uses(use, checkpointing)

    def forward(self, x: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=self.uses(self.inlet(x)))


def main() -> None:
    start()
    results: Results = {}
    for stage in range(4):
        for how in CHECKPOINTING:
            for use in ("its layer is called again", "two layers share it", "product under checkpointing"):
                name = f"{use}, {how}, stage {stage}"
                collect_case(results, name, lambda use=use, how=how, stage=stage: uses_case(use, how, stage))  # type: ignore[misc]
            if stage != 1:
                name = f"zamba2, {how}, stage {stage}"
                collect_case(results, name, lambda how=how, stage=stage: zamba_case(how, stage))  # type: ignore[misc]
    finish(results)


def uses_case(use: str, how: str, stage: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    batches = [{"x": torch.randn(4, WIDTH, generator=generator)} for _ in range(NUM_BATCHES)]
    torch.manual_seed(8)
    return run(lambda how: WithLoss(use, how), batches, how, stage)


def zamba_case(how: str, stage: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, 31, (2, 7), generator=generator) for _ in range(NUM_BATCHES)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    return run(lambda how: language_model("zamba2", how), batches, how, stage)


def run(make: Any, batches: list[dict[str, Tensor]], how: str, stage: int) -> dict[str, Any]:
    """Statistics under DeepSpeed and of plain torch, and what a masked step says."""
    torch.manual_seed(9)
    plain = make("")
    layout = layout_of(plain)
    sums, squares = {}, {}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for info in layout.eligible():
            grad = plain.get_parameter(info.name).grad
            grad = torch.zeros(info.numel) if grad is None else grad.reshape(-1).double()
            sums[info.name] = sums.get(info.name, 0) + grad
            squares[info.name] = squares.get(info.name, 0) + grad * grad
    torch.manual_seed(9)
    model = make(how)
    engine = make_engine(model, Setup(stage), adamw(model))
    with mock.patch.object(statistics, "BUCKET_ELEMENTS", 100):  # so that a finished gradient is sent at once
        stats = collect_statistics(engine, batches)
    errors = {}
    for which, expected in (("grad_sum", sums), ("square_sum", squares)):
        for name, values in whole(stats, which).items():
            want = expected[name]
            error = (torch.as_tensor(values).double() - want).norm() / want.norm().clamp(min=1e-6)
            errors[f"{which} {name}"] = float(error)
    update = attach(engine, select(stats.layout, "piece-s", 0.1, stats))
    refusal = ""
    try:
        engine.backward(engine(**batches[dist.get_rank()]).loss)
        engine.step()
    except UserError as error:
        refusal = str(error)
    else:
        engine.backward(engine(**batches[dist.get_rank()]).loss)
        engine.step()
    update.detach()
    if not refusal:
        engine.destroy()
    return {"worst": max(errors.values()), "of": max(errors, key=lambda key: errors[key]), "refusal": refusal}


if __name__ == "__main__":
    main()
