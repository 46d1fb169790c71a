"""Published files in fp8 and mxfp4 are refused; the page's lines make a copy of them that is taken."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.moe import make_moe
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from piece_ds.config.arguments import ModelArguments
from piece_ds.demo.model import make_tokenizer
from piece_ds.models.loading import load_config
from piece_ds.models.suitable import check_checkpoint
from piece_ds.runtime.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "deepspeed.md"
BLOCK = 4  # rows and columns of fp8 that share a scale; 128 in published files
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["*.self_attn", "*.router", "embed_tokens", "lm_head"]}
# What a number of four bits stands for.
FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FOUR_BITS = torch.cat([FOUR_BITS, -FOUR_BITS])


def check(folder: Path) -> None:
    arguments = ModelArguments(model_name_or_path=str(folder))
    check_checkpoint(arguments, load_config(arguments))


def save_and_check(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    check(folder)


def in_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantize every projection that blocks divide; return the files' tensors, and what they stand for."""
    stored, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 2 and name.endswith("proj.weight") and not any(size % BLOCK for size in weight.shape):
            blocks = weight.float().view(weight.shape[0] // BLOCK, BLOCK, -1, BLOCK)
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = small.view(weight.shape), scale
            meant[name] = (small.float() * scale[:, None, :, None]).view(weight.shape).to(weight.dtype)
    assert len(stored) > len(tensors)
    return stored, meant


def in_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the experts random bytes, and return what they stand for: 32 in a row share a power of two."""
    torch.manual_seed(5)
    stored, meant = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = stored.pop(name).shape
        packed = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        power = torch.randint(120, 128, packed.shape[:3], dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = packed, power
        pairs = torch.stack((FOUR_BITS[(packed & 15).long()], FOUR_BITS[(packed >> 4).long()]), dim=-1)
        values = pairs.flatten(-2) * torch.exp2(power.float() - 127)[..., None]
        meant[name] = values.flatten(-2).transpose(1, 2).bfloat16().contiguous()
    return stored, meant


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(4)
    if kind == "fp8":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    if kind == "experts in fp8":
        return make_moe("qwen3-moe").bfloat16()
    return GptOssForCausalLM(GptOssConfig(num_local_experts=4, **SIZES)).bfloat16()


# How files are quantized, what config.json says of it, and what becomes of the copy without the page's flag.
KINDS: dict[str, tuple[Callable, dict, type[Exception], str]] = {
    "fp8": (in_fp8, FP8, UserError, "is stored as F8_E4M3; give the checkpoint that it was made from"),
    "experts in fp8": (in_fp8, FP8, ValueError, "Undefined Operation"),
    "mxfp4": (in_mxfp4, MXFP4, UserError, "the files lack '.*down_proj'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_lines_make_a_copy_that_is_taken(kind: str, tmp_path: Path) -> None:
    quantize, described, error, message = KINDS[kind]
    plain, source = tmp_path / "plain", tmp_path / "publisher" / "model"
    make(kind).save_pretrained(plain)
    source.mkdir(parents=True)
    stored, meant = quantize(load_file(plain / "model.safetensors"))
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    make_tokenizer(64).save_pretrained(source)
    with pytest.raises(UserError, match=rf"is quantized \({described['quant_method']}\): .*Quantized models") as caught:
        check(source)
    assert "\n" not in str(caught.value)

    # The lines as they stand, with other folders.
    section = PAGE.read_text(encoding="utf-8").partition("## Quantized models")[2]
    (lines,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    copy = tmp_path / "copy"
    lines = lines.replace('"publisher/model-FP8"', repr(str(source))).replace('"model-bf16"', repr(str(copy)))
    if kind == "mxfp4":
        lines = lines.replace("FineGrainedFP8Config", "Mxfp4Config")
    exec(compile(lines, "docs/deepspeed.md", "exec"), made := {})  # type: ignore[var-annotated]
    check(copy)
    found, expected = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (copy, plain))
    assert found.keys() == expected.keys()
    for name, param in found.items():
        assert param.dtype == torch.bfloat16
        assert torch.equal(param, expected[name]), name
    assert (copy / "tokenizer.json").is_file()

    # Without the flag, transformers writes what nothing can train, or fails.
    with pytest.raises(error, match=message):
        save_and_check(made["model"], tmp_path / "again")
