"""Compact mode: DeepSpeed keeps masters, moments and gradients only for the selected weights."""

import torch
from small_model import collate, copy_of, count_changed, make_model, make_rows, on_one_process


def main() -> None:
    on_one_process()
    import deepspeed

    from piece_ds import MicroBatches, attach, estimate_mask, prepare_compact

    # One call before the engine is made: the model's own weights are frozen for DeepSpeed, which gets K values instead.
    model = make_model()
    before = copy_of(model)
    num_weights = sum(param.numel() for param in model.parameters())
    selected = prepare_compact(model, ratio=0.01)
    optimizer = torch.optim.AdamW(selected.parameters(), lr=1e-2, weight_decay=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    # Then as in masked mode.
    rows = make_rows()
    mask = estimate_mask(engine, MicroBatches(rows, collate, batch_size=4), method="piece-s", ratio=0.01)
    update = attach(engine, mask)
    for step in range(24):
        first = 8 * step % len(rows)
        loss = engine(**{k: v.to(engine.device) for k, v in collate(rows[first : first + 8]).items()}).loss
        engine.backward(loss)
        engine.step()
        if step % 8 == 0:
            print(f"step {step}: loss {loss.detach():.3f}")

    num_optimised = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    update.detach()
    print(f"the optimizer holds {num_optimised} values for a model of {num_weights} weights")
    print(f"{count_changed(before, engine.module)} weights changed, {mask.num_selected} were selected")


if __name__ == "__main__":
    main()
