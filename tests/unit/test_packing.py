"""Rows laid end to end: loss and every gradient are those of the padded batch, for every family that packs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from piece_ds.data.collate import Collator
from piece_ds.data.packing import PACKS, PackedCollator, check_packing
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13], "labels": [-100, -100, 7, 8, 9, 10, 11, 12, 13]},
    {"input_ids": [20, 21, 22], "labels": [20, 21, 22], "image": None},
    {"input_ids": [30, 31, 32, 33, 34, 35, 36], "labels": [-100] * 5 + [35, 36]},
]
# A window shorter than the longest row, so that a window counted across rows would show.
WINDOWED = ("mistral", "gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "vaultgemma")
# A padded batch is compared where these families are used; the others with each row alone, which no padding touches.
PADS = ("llama", "qwen3", "gemma2", "mistral")
NO_SDPA = ("gemma2", "vaultgemma")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def make(family: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **({"sliding_window": 6} if family in WINDOWED else {}))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def loss_and_gradients(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the counted tokens of all batches."""
    model.zero_grad()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    loss = sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
    loss.backward()
    return loss.item(), {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(attention: str) -> None:
    worst = {}
    for family in sorted(PACKS):
        if attention == "sdpa" and family in NO_SDPA:
            continue
        model = make(family, attention)
        padded = Collator(pad_id=0, multiple=1)
        loss, gradients = loss_and_gradients(
            model, [padded(ROWS)] if family in PADS else [padded([row]) for row in ROWS]
        )
        packed_loss, packed = loss_and_gradients(model, [PackedCollator()(ROWS)])
        assert gradients.keys() == packed.keys()
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        error = max(float((gradients[name] - packed[name]).abs().max()) for name in gradients) / scale
        worst[family] = max(error, abs(packed_loss - loss) / loss)
    assert {family for family, error in worst.items() if error > 5e-6} == set()


def test_a_row_sees_no_other_row() -> None:
    """What another row says changes nothing: not even the last bit of a logit."""
    model = make("llama", "sdpa").eval()
    changed = [{**ROWS[0], "input_ids": [40] * 9}, *ROWS[1:]]
    one, other = (model(**PackedCollator()(rows)).logits[:, 9:] for rows in (ROWS, changed))
    assert torch.equal(one, other)


def test_a_batch_has_no_padding_and_begins_its_positions_again() -> None:
    batch = PackedCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[token for row in ROWS for token in row["input_ids"]]]
    assert batch["position_ids"].tolist() == [[*range(9), *range(3), *range(7)]]
    assert batch["labels"][0, [0, 9, 12]].tolist() == [-100] * 3
    assert batch["labels"][0, 10:12].tolist() == [21, 22]
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}


def test_families_that_are_not_proven_are_refused_by_name() -> None:
    for family in ("mamba", "gpt_oss", "opt", "bloom", "jamba", "falcon_h1", "qwen3_next", "phimoe", "biogpt"):
        with pytest.raises(UserError, match=f"--packing is not proven for models of type '{family}'"):
            check_packing(AutoConfig.for_model(family), None)
    check_packing(AutoConfig.for_model("llama"), "flash_attention_2")
    with pytest.raises(UserError, match="--attn_implementation flex_attention is not proven"):
        check_packing(AutoConfig.for_model("llama"), "flex_attention")
