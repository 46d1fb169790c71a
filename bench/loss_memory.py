"""Peak memory and time of one forward and backward pass, with the model's own loss and with the loss in chunks.

python bench/loss_memory.py [--vocabulary 262144 --tokens 2048 --chunks 512]

A Llama of one small layer, so that the logits are what counts. "bytes" is the most memory above what was held before
the pass: of tensors on a GPU, resident memory of the process on a CPU. Prints a table and writes
bench/results/loss-memory-<device>.csv.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.record import device_name, write_rows
from piece_ds.evaluation.chunked_loss import install_chunked_loss
from piece_ds.runtime.profiling import host_peak_bytes, reset_peaks

HIDDEN = 16


def main() -> None:
    options = _options()
    rows: list[dict[str, Any]] = []
    for share in options.shares:
        for chunk in (0, *options.chunks):
            found = _measure(options.vocabulary, options.tokens, share, chunk)
            plain = next((row for row in rows if row["answer_share"] == share), found)
            rows.append({**found, "times_less": plain["bytes"] / found["bytes"]})
            print(
                f"{share:4.0%} answers, chunk {chunk or 'none':>5}: {found['bytes'] / 2**30:6.2f} GiB above the model, "
                f"{rows[-1]['times_less']:5.1f} times less, {found['seconds']:6.2f} s, loss {found['loss']:.6f}",
                flush=True,
            )
    write_rows(Path(__file__).resolve().parent / "results" / f"loss-memory-{device_name()}.csv", rows)


def _measure(vocabulary: int, tokens: int, share: float, chunk: int) -> dict[str, Any]:
    """Return what one pass took: the loss is of the last share of the tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config).to(device)
    install_chunked_loss(model, chunk)
    ids = torch.randint(0, vocabulary, (1, tokens), device=device)
    labels = ids.clone()
    labels[:, : int((1 - share) * tokens)] = -100

    # The pass. Gradients of the head and the embedding are there before it, as in a second step.
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    gc.collect()
    reset_peaks()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    begin = time.perf_counter()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else host_peak_bytes()
    return {
        "vocabulary": vocabulary,
        "hidden": HIDDEN,
        "tokens": tokens,
        "answer_share": share,
        "chunk_tokens": chunk,
        "loss": loss.item(),
        "bytes": int(peak or 0) - before,
        "seconds": seconds,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25], help="of the tokens that are answers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
