"""Convert a GGUF file of the Llama family to a transformers folder: 16-bit weights, tokenizer, chat template.

transformers can read GGUF too. But it builds the whole model to do so, refuses to save what it loaded, and partitions
the model while a ZeRO-3 configuration is alive. Here tensors go from file to file through numpy.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from piece_ds.runtime.errors import UserError

# llama.cpp's name -> transformers' name, below model.layers.N.
_OF_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def convert_gguf(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of a GGUF file to folder, as transformers' save_pretrained() would.

    Args:
        source: the file. Its quantized tensors are dequantized in fp32, then rounded once to dtype.
        folder: exists and is empty.
        dtype: of the weights written.
    Raises:
        UserError: the file holds another architecture than Llama, or a tensor that a Llama does not have.
    Cost: about 3 s and 1 GB of memory for 135 M parameters.
    """
    from gguf import GGUFReader

    # The configuration, from the file's fields.
    reader = GGUFReader(source)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.endswith(("tokens", "merges"))
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config_of(fields, ties_head="output.weight" not in tensors, source=source)

    # The weights, in the layout that transformers expects.
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        weight = _dequantized(tensor)
        # llama.cpp stores these two in another order of rows.
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = _half_by_half(weight, heads)
        state[_name_of(name, source)] = torch.from_numpy(np.array(weight)).to(
            dtype
        )  # a copy: the file is mapped read-only
    save_file(state, folder / "model.safetensors", {"format": "pt"})

    # What stands beside them in a model folder.
    config.dtype = dtype
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Which tokens are special, the file says. transformers 5.17 takes others: an end that is the beginning.
    for kind, number in special.items():
        if number is not None:
            setattr(tokenizer, kind.removesuffix("_id"), tokenizer.convert_ids_to_tokens(number))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _config_of(fields: dict[str, Any], ties_head: bool, source: Path) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{source}: expected a GGUF file of a Llama, got one of {architecture!r}")
    # Fields have the prefix of their part: the model's sizes, and the ids of special tokens.
    of_model = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    of_tokens = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    num_heads = of_model["attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=of_model["vocab_size"],
        hidden_size=of_model["embedding_length"],
        intermediate_size=of_model["feed_forward_length"],
        num_hidden_layers=of_model["block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=of_model.get("attention.head_count_kv", num_heads),
        head_dim=of_model.get("rope.dimension_count", of_model["embedding_length"] // num_heads),
        max_position_embeddings=of_model["context_length"],
        rms_norm_eps=of_model["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of_model.get("rope.freq_base", 10000.0)},
        tie_word_embeddings=ties_head,
        bos_token_id=of_tokens.get("bos_token_id"),
        eos_token_id=of_tokens.get("eos_token_id"),
        pad_token_id=of_tokens.get("padding_token_id"),
    )


def _name_of(name: str, source: Path) -> str:
    of_layer = _LAYER_TENSOR.fullmatch(name)
    if of_layer and of_layer[2] in _OF_LAYER:
        return f"model.layers.{of_layer[1]}.{_OF_LAYER[of_layer[2]]}.weight"
    if name.removesuffix(".weight") in _OUTSIDE:
        return f"{_OUTSIDE[name.removesuffix('.weight')]}.weight"
    raise UserError(f"{source}: holds a tensor {name!r}, which no Llama of transformers has")


def _dequantized(tensor: Any) -> np.ndarray:
    """Return a tensor in fp32 and in row-major shape. GGUF lists dimensions fastest first."""
    from gguf import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)


def _half_by_half(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the rows of a query or key matrix in transformers' order.

    Rotary embedding rotates rows in pairs. llama.cpp keeps the two rows of a pair next to each other. transformers
    keeps all first rows of a head, then all second rows.

    Args:
        weight: fp32, (num_heads * head size, hidden size).
        num_heads: heads in the matrix.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)
