"""A task's change as a file: put on the folder that is served, taken off again, to the bit."""

import hashlib
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from small_model import collate, make_model, make_rows


def main(folder: Path) -> None:
    from piece_ds import Mask, SparseAdamW, layout_of
    from piece_ds.__main__ import main as piece_ds
    from piece_ds.checkpoint.delta_file import save_delta
    from piece_ds.zero.weights import read_selected

    # The folder that is served, and a mask: here the largest weights of each tensor.
    served = folder / "model"
    model = make_model()
    model.save_pretrained(served)
    served_file = served / "model.safetensors"
    layout = layout_of(model)
    params = dict(model.named_parameters())
    index = {
        info.name: params[info.name].detach().abs().view(-1).topk(max(1, info.numel // 100)).indices.sort().values
        for info in layout.eligible()
    }
    mask = Mask(layout, index, sum(map(len, index.values())), "largest", 0.01)

    # Train it, and keep what changed: positions, new and previous values.
    previous = read_selected(model, mask)
    optimizer = SparseAdamW(model, mask, lr=1e-2)
    rows = make_rows()
    for step in range(8):
        model(**collate(rows[8 * step : 8 * step + 8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    save_delta(folder / "task.safetensors", model, mask, previous)
    sizes = [path.stat().st_size for path in (folder / "task.safetensors", served_file)]
    print(f"the delta is {sizes[0]} bytes, the model {sizes[1]}")

    # On, and off: the same as `piece_ds delta apply` and `piece_ds delta revert`.
    first = sha256(served_file)
    piece_ds(["delta", "apply", str(served), str(folder / "task.safetensors"), "--in_place"])
    stored = type(model).from_pretrained(served).state_dict()
    same = all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    print(f"served as trained: {same}")
    piece_ds(["delta", "revert", str(served), str(folder / "task.safetensors"), "--in_place"])
    print(f"the file is the first one again: {sha256(served_file) == first}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else mkdtemp()))
