"""Statistics hold no random number: routers choose the best expert, and a model that draws elsewhere is refused."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import argument_sweep as sweep
from support.causal_classes import tiny_model
from support.launches import make_model_folder, make_rows, one_process, write_rows
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.demo.model import VOCAB_SIZE, make_tokenizer
from piece_ds.runtime.errors import UserError
from piece_ds.zero.random_draws import DrawWatch, refuse_random_loss
from piece_ds.zero.undisturbed import undisturbed

IDS = torch.arange(16).view(2, 8) + 5


class Noisy(nn.Module):
    """A layer that draws a number where no setting can switch it off."""

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.randn_like(values)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(32, 4), layer

    def forward(self) -> Tensor:
        return self.layer(self.embedding(IDS)).square().mean()


def engine_of(module: nn.Module) -> Any:
    return SimpleNamespace(module=module, device=torch.device("cpu"), train=module.train)


def losses(engine: Any) -> set[float]:
    """Of one micro-batch, with other random states each time."""
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(engine.module(input_ids=IDS, labels=IDS).loss.item())
    return found


def test_routers_that_draw_their_experts_in_training_take_the_best_ones() -> None:
    # With a threshold this large every expert may be drawn.
    model = tiny_model("phimoe", router_jitter_noise=5.0).train()
    engine = engine_of(model)
    assert len(losses(engine)) == 4
    with undisturbed(engine):
        assert len(losses(engine)) == 1
        assert all(layer.training for layer in model.model.layers)
    assert all(module.training for module in model.modules())


def test_a_draw_of_any_generator_is_seen() -> None:
    watch = DrawWatch("cpu")
    torch.zeros(3).sum()
    assert not watch.drew()
    for draw in (random.random, np.random.rand, lambda: torch.rand(1), lambda: torch.zeros(1).bernoulli_()):
        watch = DrawWatch("cpu")
        draw()
        assert watch.drew()


def test_a_loss_that_is_not_the_same_twice_is_refused_with_the_module_that_draws() -> None:
    for layer, refused in ((Noisy(), True), (nn.Dropout(0.5), True), (nn.Dropout(0.0), False), (nn.Identity(), False)):
        module = Model(layer).train()
        engine = engine_of(module)
        torch.manual_seed(0)
        pair = (module(), module())
        if not refused:
            refuse_random_loss(engine, *pair, module)
            continue
        with pytest.raises(UserError, match=f"changes from one forward pass .*: {type(layer).__name__} draws"):
            refuse_random_loss(engine, *pair, module)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with one_process():
        make_tokenizer(256).save_pretrained(tmp_path / "model")
        write_rows(tmp_path / "train.jsonl", make_rows(0, 8, ("A", "B")))
        write_rows(tmp_path / "eval.jsonl", make_rows(1, 4, ("A", "B")))
        yield tmp_path


SIZES = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_routers_that_draw_do_not_reach_the_mask(folder: Path) -> None:
    tiny_model("phimoe", router_jitter_noise=5.0, **SIZES).save_pretrained(folder / "model")
    masks = []
    for seed in (1, 2):
        flags = ["--method=piece-s", f"--seed={seed}", "--save_model=never", f"--output_dir={folder / str(seed)}"]
        train(load_settings([*sweep.base_flags(folder), *flags]))
        masks.append((folder / str(seed) / "00-train" / "mask.safetensors").read_bytes())
    assert masks[0] == masks[1]


def test_a_model_that_draws_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In evaluation too.
    hashes = {"attn_layers": ["lsh", "lsh"], "lsh_attn_chunk_length": 4, "num_buckets": 4, "feed_forward_size": 16}
    tiny_model("reformer", **hashes, **SIZES).save_pretrained(folder / "model")
    found, said = sweep.outcome(sweep.base_flags(folder), folder / "out", trains=True)
    assert (found, "draws random numbers in evaluation too" in said) == ("refused", True), (found, said)

    # In training alone.
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: forward(self, x + torch.rand_like(x) * 0.1 if self.training else x)
    )
    make_model_folder(folder / "llama")
    flags = [*sweep.base_flags(folder), "--model_name_or_path", str(folder / "llama"), "--method=piece-s"]
    found, said = sweep.outcome(flags, folder / "out", trains=True)
    assert (found, "LlamaMLP draws random numbers" in said) == ("refused", True), (found, said)
