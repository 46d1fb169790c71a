"""PIECE in a plain DeepSpeed loop: two calls before it, and the loop stays as it is."""

import torch
from small_model import collate, copy_of, count_changed, make_model, make_rows, on_one_process


def main() -> None:
    on_one_process()
    import deepspeed

    from piece_ds import MicroBatches, attach, estimate_mask

    # Your model, optimizer and engine.
    model = make_model()
    before = copy_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    # The two calls: which weights matter for these rows, and nothing else may change.
    rows = make_rows()
    mask = estimate_mask(engine, MicroBatches(rows, collate, batch_size=4), method="piece-s", ratio=0.01)
    update = attach(engine, mask)

    # Your loop.
    for step in range(24):
        first = 8 * step % len(rows)
        loss = engine(**{k: v.to(engine.device) for k, v in collate(rows[first : first + 8]).items()}).loss
        engine.backward(loss)
        engine.step()
        if step % 8 == 0:
            print(f"step {step}: loss {loss.detach():.3f}")

    update.detach()
    print(f"{count_changed(before, engine.module)} weights changed, {mask.num_selected} were selected")


if __name__ == "__main__":
    main()
