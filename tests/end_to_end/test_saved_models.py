"""model/ of a tied model holds every tensor once and equals the base with the delta applied, at every ZeRO stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launches import CONFIGS, ROOT, environment, launch, make_rows, same_bits, succeeded, weights, write_rows
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from piece_ds.demo.model import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=VOCAB_SIZE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **shape)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(256).save_pretrained(folder)
    write_rows(folder / "train.json", make_rows(1, 8, ("yes", "no")))
    return folder


def zero3_without_gathering(folder: Path) -> Path:
    content = json.loads((CONFIGS / "zero3.json").read_text())
    del content["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    path = folder / "zero3_plain.json"
    path.write_text(json.dumps(content))
    return path


FAST = [("zero2", "compact"), ("plain", "masked")]
SLOW = [(f"zero{stage}", "masked") for stage in range(3)] + [("plain", "compact"), ("zero3_offload_all", "compact")]


@pytest.mark.parametrize(("setting", "mode"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_model_is_the_base_with_the_delta(base: Path, tmp_path: Path, setting: str, mode: str) -> None:
    deepspeed = zero3_without_gathering(tmp_path) if setting == "plain" else CONFIGS / f"{setting}.json"
    out = tmp_path / "out"
    flags = {"deepspeed": deepspeed, "model_name_or_path": base, "train_file": base / "train.json", "output_dir": out}
    flags |= {"update_mode": mode, "mask_ratio": 0.05, "max_steps": 1, "per_device_train_batch_size": 2}
    flags |= {"learning_rate": 1e-2, "max_eval_samples": 2}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]
    succeeded(launch("python", 1, "train.py", *arguments))
    saved = weights(out / "00-train" / "model")
    assert "lm_head.weight" not in saved
    assert saved.keys() == weights(base).keys()
    assert not same_bits(saved, weights(base))
    applied = tmp_path / "applied"
    command = [sys.executable, "-m", "piece_ds", "delta", "apply", base, out, "--output", applied]
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment(), check=True)
    assert same_bits(saved, weights(applied))
    model = AutoModelForCausalLM.from_pretrained(out / "00-train" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
