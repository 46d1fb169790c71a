"""model/ of a tied model holds every tensor once and equals the base with the delta applied, at every ZeRO stage."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, make_rows, same_bits, weights, write_rows
from support.stream_runs import as_flags
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from piece_ds.__main__ import main
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


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, Results]]:
    """Runs of the fast settings, or of the others, one after another: where they are, and how they ended."""
    return cache(lambda fast: run(base, tmp_path_factory.mktemp("saved"), FAST if fast else SLOW))


def run(base: Path, job: Path, settings: list[tuple[str, str]]) -> tuple[Path, Results]:
    jobs = {}
    for setting, mode in settings:
        deepspeed = zero3_without_gathering(job) if setting == "plain" else CONFIGS / f"{setting}.json"
        out = job / f"{setting}-{mode}"
        flags = {"deepspeed": deepspeed, "model_name_or_path": base, "train_file": base / "train.json"}
        flags |= {"update_mode": mode, "mask_ratio": 0.05, "max_steps": 1, "per_device_train_batch_size": 2}
        jobs[out.name] = as_flags({**flags, "learning_rate": 1e-2, "max_eval_samples": 2, "output_dir": out})
    (job / "runs.json").write_text(json.dumps(jobs))
    return job, run_job("support.train_job", 1, job)


@pytest.mark.parametrize(("setting", "mode"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_model_is_the_base_with_the_delta(
    base: Path, runs: Callable[[bool], tuple[Path, Results]], tmp_path: Path, setting: str, mode: str
) -> None:
    job, results = runs((setting, mode) in FAST)
    result_of(results, f"{setting}-{mode}")
    out = job / f"{setting}-{mode}"
    saved = weights(out / "00-train" / "model")
    assert "lm_head.weight" not in saved
    assert saved.keys() == weights(base).keys()
    assert not same_bits(saved, weights(base))
    applied = tmp_path / "applied"
    main(["delta", "apply", str(base), str(out), "--output", str(applied)])
    assert same_bits(saved, weights(applied))
    model = AutoModelForCausalLM.from_pretrained(out / "00-train" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
