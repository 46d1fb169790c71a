"""One process of the doctor's self-test: `python -m piece_ds.doctor.probe RESULT`, with a launcher's environment."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.doctor.findings import BAD, GOOD
from piece_ds.runtime.distributed import all_gather_objects, collective_device, rank, world_size
from piece_ds.runtime.process import start_distributed

RATIO = 0.01


def main() -> None:
    """Try collectives and training, and write what rank 0 found."""
    start_distributed()
    found = {"collectives": _finding(*_try_collectives()), "statistics, mask, step": _finding(*_try_training())}
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _finding(wrong: list[str], right: str) -> dict[str, str]:
    # One rank's problem is everyone's.
    everywhere = [problem for problems in all_gather_objects(wrong) for problem in problems]  # type: ignore[attr-defined]
    return {"status": BAD if everywhere else GOOD, "found": "; ".join(everywhere) or right}


def _try_collectives() -> tuple[list[str], str]:
    """Run the collectives that a run calls, with known results; return what is wrong, and what is right."""
    size, own, device = world_size(), rank(), collective_device()
    mine = torch.arange(4.0, device=device) + 10 * own
    total = mine.clone()
    dist.all_reduce(total)
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    received = torch.empty(size, device=device)
    dist.all_to_all_single(received, torch.arange(size, device=device) + 100.0 * own)
    sent = torch.full((1,), float(own), device=device)
    dist.broadcast(sent, src=size - 1)

    # Every result is a small whole number, so equality is exact.
    right = {
        "all-reduce": total.tolist() == [size * x + 10 * sum(range(size)) for x in range(4)],
        "all-gather": [part[0].item() for part in parts] == [10.0 * r for r in range(size)],
        "all-to-all": received.tolist() == [own + 100.0 * r for r in range(size)],
        "broadcast": sent.item() == size - 1,
    }
    wrong = [f"{name} gives wrong numbers on rank {own}" for name, is_right in right.items() if not is_right]
    return wrong, f"{', '.join(right)} over {dist.get_backend()}, {size} processes"


def _try_training() -> tuple[list[str], str]:
    """Take statistics, select a mask and step at ZeRO-3; return what is wrong, and what is right.

    Exactly the selected weights may change.
    """
    import deepspeed

    from piece_ds.methods.estimate import estimate_mask
    from piece_ds.update.attach import attach, prepare_compact

    # An engine as a run has it.
    model = _tiny_model()
    optimizer = torch.optim.AdamW(prepare_compact(model, ratio=RATIO).parameters(), lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    # Select a mask, and take one step.
    ids = torch.arange(32).view(4, 8)
    batches = [{"input_ids": row.view(1, 8), "labels": row.view(1, 8)} for row in ids]
    mask = estimate_mask(engine, batches, method="piece-s", ratio=RATIO)
    before = _weights(engine.module)
    attach(engine, mask)
    batch = {name: values.to(engine.device) for name, values in batches[rank() % len(batches)].items()}
    engine.backward(engine(**batch).loss)
    engine.step()

    # Compare bits: no unselected weight may have changed, and every selected one must have.
    after = _weights(engine.module)
    outside = moved_outside(before, after, mask.whole())
    wrong = [f"unselected weights of {name} have changed on rank {rank()}" for name in outside]
    num_moved = sum(_moved(old, after[name]).numel() for name, old in before.items())
    if num_moved != mask.num_selected:
        wrong.append(f"{num_moved} of {mask.num_selected} selected weights moved on rank {rank()}")
    engine.empty_partition_cache()
    engine.destroy()
    num_others = sum(values.numel() for values in before.values()) - mask.num_selected
    return wrong, f"{num_moved} of {mask.num_selected} selected weights moved, the other {num_others} kept all bits"


def moved_outside(before: dict[str, Tensor], after: dict[str, Tensor], selected: dict[str, Tensor]) -> list[str]:
    """Return the parameters in which an element outside the selected positions has changed its bits."""
    return [
        name
        for name, old in before.items()
        if not set(_moved(old, after[name]).tolist()) <= set(selected.get(name, torch.zeros(0)).tolist())
    ]


def _moved(old: Tensor, new: Tensor) -> Tensor:
    return (old.view(torch.int32) != new.view(torch.int32)).nonzero().view(-1)


def _tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all of the model's own weights, whole, flat, fp32, on the CPU. A collective."""
    import deepspeed

    from piece_ds.state.partition import is_partitioned
    from piece_ds.state.selected_values import PARAMETER_NAME

    found = {}
    for name, param in model.named_parameters():
        if name != PARAMETER_NAME:
            with deepspeed.zero.GatheredParameters([param], enabled=is_partitioned(param)):
                found[name] = param.detach().float().cpu().reshape(-1).clone()
    return found


if __name__ == "__main__":
    main()
