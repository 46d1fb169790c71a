"""What a link of a chain of deltas costs: milliseconds to write it, to apply it to a live model, and its bytes.

    python bench/chain.py       # SmolLM2-135M in bf16, 134 515 random positions; into bench/results/chain-DEVICE.csv

Every link changes all selected values. `checked` compares fingerprints, as a follower does; `set` is LiveDelta.set_ of
a link that is open already; `reload` is what the chain saves: reading the whole model file into the model.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from delta_codings import MODEL, NUM_ENTRIES, chosen_positions, real_layout
from record import device_name, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from piece_ds.deltas import ChainFollower, apply_delta_
from piece_ds.deltas.chain_files import link_files
from piece_ds.models.pretrained import model_source
from piece_ds.state.mask import Mask
from piece_ds.training.chain_writer import ChainWriter
from piece_ds.zero.weights import read_selected

NUM_LINKS = 20


def main() -> None:
    """Write NUM_LINKS links, follow them with a second model, and write one row a measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / f"chain-{device_name()}.csv"
    parser.add_argument("--output", type=Path, default=default)
    output = parser.parse_args().output
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = model_source(MODEL)
    trained, copy = (AutoModelForCausalLM.from_pretrained(source).bfloat16().to(device) for _ in range(2))
    layout = real_layout()
    mask = Mask(layout, chosen_positions(layout), NUM_ENTRIES, "random", NUM_ENTRIES / layout.total)
    times: dict[str, list[float]] = {}

    with tempfile.TemporaryDirectory() as scratch:
        writer = ChainWriter(Path(scratch), trained, mask, read_selected(trained, mask))
        follower = ChainFollower(copy, scratch)
        for step in range(NUM_LINKS):
            _move(trained, mask)
            _measure(times, "write", lambda step=step: writer.write(step + 1))
            _measure(times, "apply, checked", follower.apply_new)
        size = link_files(Path(scratch))[-1].stat().st_size
        for path in link_files(Path(scratch)):
            _measure(times, "apply, unchecked", lambda path=path: apply_delta_(copy, path))
        live = apply_delta_(copy, path)
        for _ in range(NUM_LINKS):
            _measure(times, "set", live.set_)
        assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), copy.parameters(), strict=True))
    for _ in range(3):
        _measure(times, "reload", lambda: _reload(copy, Path(source) / "model.safetensors"))
    rows = [_row(name, measured, size) for name, measured in times.items()]
    write_rows(output, rows)
    for row in rows:
        print(row)


def _move(model: torch.nn.Module, mask: Mask) -> None:
    params = dict(model.named_parameters())
    for name, index in mask.index.items():
        params[name].data.view(-1)[index.to(params[name].device)] *= -1


def _reload(model: torch.nn.Module, file: Path) -> None:
    model.load_state_dict(load_file(file), strict=False)  # a tied head is not in the file


def _measure(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times.setdefault(name, []).append(1000 * (time.perf_counter() - begin))


def _row(name: str, measured: list[float], size: int) -> dict[str, Any]:
    ordered = sorted(measured[1:] if len(measured) > 3 else measured)  # the first warms up
    return {
        "measure": name,
        "entries": NUM_ENTRIES,
        "file_bytes": size,
        "repeats": len(ordered),
        "median_ms": round(statistics.median(ordered), 2),
        "p20_ms": round(ordered[len(ordered) // 5], 2),
        "p80_ms": round(ordered[4 * len(ordered) // 5], 2),
    }


if __name__ == "__main__":
    main()
