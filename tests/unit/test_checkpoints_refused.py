"""A checkpoint that is not the whole causal model that it seems to be is refused in one line, from its headers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.causal_classes import tiny_model
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.checkpoint_files import stored_tensors
from piece_ds.models.loading import dtype_of, load_config, load_model, require_weights
from piece_ds.models.suitable import check_checkpoint
from piece_ds.runtime.errors import UserError

Change = Callable[[Path], None]
NORM = "model.layers.1.input_layernorm.weight"


def arguments(folder: Path, dtype: str = "auto") -> ModelArguments:
    return ModelArguments(model_name_or_path=str(folder), dtype=dtype)


def check(folder: Path) -> None:
    """What every command does before anything is written."""
    config = load_config(arguments(folder))
    require_weights(arguments(folder))
    check_checkpoint(arguments(folder), config)
    dtype_of(arguments(folder), config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bf16 in one file."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def set_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_tensors(change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_key(name: str) -> Change:
    return set_tensors(lambda tensors: tensors.pop(name))


def to_bytes(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint8)


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


WHOLE_CHANGES: dict[str, tuple[Change, str]] = {
    "a missing norm": (without_key(NORM), f"the files lack {NORM!r}, which would be random"),
    "a missing head": (without_key("lm_head.weight"), "the files lack 'lm_head.weight'"),
    "missing embeddings": (without_key("model.embed_tokens.weight"), "the files lack 'model.embed_tokens.weight'"),
    "another prefix": (
        set_tensors(lambda t: [t.update({f"net.{name}": t.pop(name)}) for name in list(t)]),
        "and 18 more tensors",
    ),
    "one layer too few": (set_config(num_hidden_layers=3), "the files lack 'model.layers.2"),
    "another vocabulary": (set_config(vocab_size=80), "'lm_head.weight', 'model.embed_tokens.weight' in another shape"),
    "another width": (set_config(intermediate_size=40), "in another shape than config.json asks for"),
    "a tie that the files deny": (set_config(tie_word_embeddings=True), "ties 'lm_head.weight' to"),
    "gptq": (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantized \(gptq\)"),
    "awq": (set_config(quantization_config={"quant_method": "awq", "bits": 4}), r"is quantized \(awq\)"),
    "bitsandbytes": (
        set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantized \(bitsandbytes\)",
    ),
    "fp8": (set_config(quantization_config={"quant_method": "fp8"}), r"is quantized \(fp8\)"),
    "bytes without a word": (set_tensors(to_bytes), "is quantized: '.*proj.weight' is stored as U8"),
    "a damaged file": (cut_file, "model.safetensors is damaged"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "the folder holds no weights"),
    "an adapter alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        "the folder holds no weights",
    ),
}


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def set_index(change: Callable[[dict[str, str]], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return apply


SHARDED_CHANGES: dict[str, tuple[Change, str]] = {
    "a shard gone": (lambda folder: shard_of(folder).unlink(), "00002-of-.* is missing, which model.safetensors.index"),
    "a shard cut": (lambda folder: shard_of(folder).write_bytes(b"12345678"), "00002-of-.* is damaged"),
    "a shard twice": (
        lambda folder: shutil.copy(sorted(folder.glob("model-*"))[0], shard_of(folder)) and None,
        "does not hold .* though model.safetensors.index.json says so",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "the folder holds no weights",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "index.json cannot be read",
    ),
    "an index that leads outside": (set_index(lambda where: where.update({NORM: "../x.safetensors"})), "outside"),
    "an index without a tensor": (set_index(lambda where: where.pop(NORM)), ""),
}


def test_what_is_not_a_whole_checkpoint_is_refused(whole: Path, sharded: Path, tmp_path: Path) -> None:
    for source, changes in ((whole, WHOLE_CHANGES), (sharded, SHARDED_CHANGES)):
        check(source)
        for number, (what, (change, message)) in enumerate(changes.items()):
            folder = tmp_path / f"{source.name}-{number}"
            shutil.copytree(source, folder)
            change(folder)
            if not message:  # the file still holds it
                check(folder)
                continue
            with pytest.raises(UserError, match=message) as caught:
                check(folder)
            assert "\n" not in str(caught.value), what


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    small = {"d_model": 16, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1}
    bert = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    models = {
        "is an encoder-decoder": BartForConditionalGeneration(BartConfig(**small)),
        "T5Config": T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, num_layers=1, d_kv=8, d_ff=16)),
        "would see the answers": BertForMaskedLM(bert),
    }
    for number, (message, model) in enumerate(models.items()):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            check(folder)


def test_the_dtype_is_that_of_the_files_whatever_the_config_says(whole: Path, tmp_path: Path) -> None:
    for number, stated in enumerate(({"dtype": None}, {"dtype": "float32"}, {"torch_dtype": "float16"})):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        set_config(**stated)(folder)
        assert dtype_of(arguments(folder), load_config(arguments(folder))) == torch.bfloat16
        assert dtype_of(arguments(folder, "float32"), load_config(arguments(folder))) == torch.float32
    one_in_fp32 = tmp_path / "mixed"
    shutil.copytree(whole, one_in_fp32)
    set_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].float()}))(one_in_fp32)
    assert dtype_of(arguments(one_in_fp32), load_config(arguments(one_in_fp32))) == torch.bfloat16


def test_a_tie_that_is_stored_twice_with_the_same_bits_is_taken(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(whole, folder)
    set_config(tie_word_embeddings=True)(folder)
    set_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    check(folder)
    set_tensors(lambda t: t["lm_head.weight"][-1, -1].add_(1.0))(folder)
    with pytest.raises(UserError, match="two different tensors"):
        check(folder)


def test_whole_checkpoints_of_every_way_to_store_are_taken(tmp_path: Path) -> None:
    """Stacked experts, renamed heads, ties, shared blocks, vectors and scalars of recurrences."""
    families = (
        "gpt2",
        "gpt_neox",
        "mixtral",
        "qwen3_moe",
        "zamba2",
        "falcon_mamba",
        "rwkv",
        "bloom",
        "opt",
        "gemma3_text",
    )
    for family in (*families, "roberta", "bert", "mamba2", "recurrent_gemma", "lfm2"):
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        check(folder)
        assert stored_tensors(folder)


def test_every_file_that_an_index_of_pickled_weights_names_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    index, parts = folder / "pytorch_model.bin.index.json", ["a.bin", "b.bin"]
    with pytest.raises(UserError, match="the folder holds no weights"):
        require_weights(arguments(folder))
    index.write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin", "z": "a.bin"}}))
    for present in ([], ["a.bin"], ["b.bin"]):
        for name in parts:
            (folder / name).unlink(missing_ok=True)
        for name in present:
            (folder / name).touch()
        missing = next(name for name in parts if name not in present)
        with pytest.raises(UserError, match=f"{missing} is missing, which {index.name} names"):
            require_weights(arguments(folder))
    for name in parts:
        (folder / name).touch()
    require_weights(arguments(folder))
    for wrong in ({"x": "../a.bin"}, {"x": 1}, ["a.bin"]):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match="fetch the checkpoint again"):
            require_weights(arguments(folder))


def test_pickled_weights_are_checked_when_they_are_loaded(whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    check(tmp_path)
    load_model(arguments(tmp_path), torch.bfloat16)
    torch.save({name: tensor for name, tensor in tensors.items() if name != NORM}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"the files lack {NORM!r}"):
        load_model(arguments(tmp_path), torch.bfloat16)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
