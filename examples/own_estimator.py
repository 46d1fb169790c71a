"""An importance estimator of one's own: a function and one line; selection and training follow."""

import torch
from small_model import collate, make_model, make_rows, on_one_process
from torch import Tensor


def fisher_times_weight(fragment) -> Tensor:  # type: ignore[no-untyped-def]
    """Score weights by w^2 sum g^2: what setting a weight to 0 would cost, to second order."""
    weight = fragment.weight().to(fragment.device).float()
    return weight.square() * fragment.square_sum


def main() -> None:
    on_one_process()
    import deepspeed

    from piece_ds import MicroBatches, attach, estimate_mask, register_estimator

    register_estimator("obd", fisher_times_weight, needs="squares", help="w^2 sum g^2", source="LeCun et al. 1990")

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    # Its name now works wherever a method is named, --method included.
    batches = MicroBatches(make_rows(), collate, batch_size=4)
    masks = {method: estimate_mask(engine, batches, method=method, ratio=0.01).whole() for method in ("obd", "piece-s")}
    obd, piece_s = masks["obd"], masks["piece-s"]
    shared = sum(int(torch.isin(obd[name], piece_s[name]).sum()) for name in obd.keys() & piece_s.keys())
    total = sum(index.numel() for index in obd.values())
    print(f"obd and piece-s share {shared} of {total} selected weights")

    mask = estimate_mask(engine, batches, method="obd", ratio=0.01)
    attach(engine, mask)
    for step in range(8):
        rows = [batches.rows[(8 * step + i) % 64] for i in range(8)]
        loss = engine(**{k: v.to(engine.device) for k, v in collate(rows).items()}).loss
        engine.backward(loss)
        engine.step()
    print(f"trained with {mask.method}: loss {loss.detach():.3f}")


if __name__ == "__main__":
    main()
