"""A mixture of experts from its published files through a run to a delta, and back to the published bytes."""

from pathlib import Path

import pytest
import torch
from support.deltas import sha256_of
from support.launches import CONFIGS, launch, make_rows, same_bits, succeeded, weights, write_rows
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

from piece_ds.__main__ import main
from piece_ds.demo.model import VOCAB_SIZE, make_tokenizer

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_base(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    if family == "mixtral":
        config = MixtralConfig(
            num_key_value_heads=2, intermediate_size=16, num_local_experts=4, output_router_logits=True, **SHAPE
        )
        model = MixtralForCausalLM(config)
    else:
        sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        sizes |= {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "moe_intermediate_size": 16}
        config = DeepseekV3Config(first_k_dense_replace=1, intermediate_size=48, **sizes, **SHAPE)
        model = DeepseekV3ForCausalLM(config)
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 4))
        torch.nn.init.normal_(model.model.layers[1].mlp.gate.weight, std=0.3)
    model.to(torch.bfloat16)
    if family != "mixtral":
        # As published: transformers keeps the balancing bias in fp32, whatever the model's dtype is.
        gate = model.model.layers[1].mlp.gate
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    model.save_pretrained(folder)
    make_tokenizer(256).save_pretrained(folder)
    write_rows(folder.parent / "train.json", make_rows(1, 16, ("yes", "no")))
    return folder


FAST = [("mixtral", 3, "compact")]
SLOW = [
    ("mixtral", 3, "masked"),
    ("mixtral", 2, "compact"),
    ("deepseek-v3", 3, "compact"),
    ("deepseek-v3", 2, "masked"),
]


@pytest.mark.parametrize(
    ("family", "stage", "mode"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_the_delta_of_a_run_goes_on_the_published_files(tmp_path: Path, family: str, stage: int, mode: str) -> None:
    base, out = make_base(tmp_path / "base", family), tmp_path / "out"
    flags = {"deepspeed": CONFIGS / f"zero{stage}.json", "model_name_or_path": base, "output_dir": out}
    flags |= {"train_file": tmp_path / "train.json", "update_mode": mode, "mask_ratio": 0.05, "max_steps": 2}
    flags |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_eval_samples": 2}
    done = launch("torchrun", 2, "train.py", *(text for name, value in flags.items() for text in (f"--{name}", value)))
    succeeded(done)
    assert "of routers" in done.stderr + done.stdout

    # The run's own model is the base with its delta, in the names of the published files.
    saved, published = weights(out / "00-train" / "model"), weights(base)
    assert saved.keys() == published.keys()
    assert any("experts.3." in name for name in published)
    moved = {name for name in saved if not torch.equal(saved[name], published[name])}
    assert any("experts.3." in name for name in moved)
    assert not [name for name in moved if ".gate." in name]  # routers and their balancing bias
    applied = tmp_path / "applied"
    delta("apply", base, out, "--output", applied)
    assert same_bits(saved, weights(applied))
    delta("revert", applied, out, "--in_place")
    assert sha256_of(applied) == sha256_of(base)


def delta(*words: object) -> None:
    main(["delta", *map(str, words)])
