"""A tiny model of every causal class of the installed transformers, from its own configuration class."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 64
PAD = 1

# A value of each kind of size -> the names that configurations have for it.
_SIZES: dict[float, str] = {
    VOCAB: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len seq_length max_target_positions"
    " max_source_positions",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim dim_model lru_width",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_ff ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"
    " num_encoder_layers num_key_value_heads multi_query_group_num num_experts_per_tok moe_k"
    " linear_num_key_heads bos_token_id decoder_start_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
    " num_experts n_routed_experts num_local_experts moe_num_experts mamba_d_state state_size ssm_state_size"
    " time_step_rank mamba_dt_rank conv_kernel linear_num_value_heads linear_conv_kernel_dim",
    8: "head_dim dim_head kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim d_head d_kv mamba_d_head"
    " mamba_n_heads n_mamba_heads mamba_num_heads mamba_head_dim mamba_headdim chunk_size mamba_chunk_size"
    " sliding_window attention_window_size local_attention_window window_size linear_key_head_dim"
    " linear_value_head_dim rotary_dim",
    # Few index heads tie (their scores pass a ReLU), and which of equal scores is chosen depends on the length.
    16: "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size index_head_dim index_topk"
    " index_n_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups mamba_ngroups n_groups pad_token_id",
    3: "eos_token_id",
    60: "image_token_id",
    61: "video_token_id",
    62: "audio_token_id",
    # Weights large enough for what padding does to show: at the default 0.02 tiny models are nearly linear.
    0.2: "initializer_range init_std",
}
TINY = {name: value for value, names in _SIZES.items() for name in names.split()}
_MAY_BE_NONE = ("head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")

# What a family needs besides, found by its own errors.
_BESIDES: dict[str, dict[str, Any]] = {
    "prophetnet": {"num_hidden_layers": None},
    "xlnet": {"max_position_embeddings": None},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "local"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "head_dim": None, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal class."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str, **besides: Any) -> nn.Module:
    """The causal model of a type, tiny, in evaluation mode, the same at every call. Raises what the class raises.

    besides: settings in place of the tiny ones.
    """
    config_class = CONFIG_MAPPING[model_type]
    options = _tiny_options(config_class)
    for name in getattr(config_class, "sub_configs", None) or {}:
        default = getattr(config_class(), name, None)
        if default is not None and hasattr(default, "to_dict"):
            options[name] = {"model_type": default.model_type, **_tiny_options(type(default))}
    for name, value in _BESIDES.get(model_type, {}).items():
        options.pop(name, None)
        options |= {} if value is None else {name: value}
    config = config_class(**options | besides)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _tiny_options(config_class: Any) -> dict[str, Any]:
    default = config_class()
    options: dict[str, Any] = {}
    for name, value in TINY.items():
        if not hasattr(default, name) or not _can_be_set(config_class, name):
            continue
        current = getattr(default, name)
        is_number = isinstance(current, int | float) and not isinstance(current, bool)
        if is_number or (current is None and name in _MAY_BE_NONE) or (isinstance(current, list) and "token" in name):
            options[name] = value
    if "kv_lora_rank" in options and "num_key_value_heads" in options:  # latent attention has no groups
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None) if _can_be_set(config_class, name) else None
        if isinstance(kinds, list):
            each = list(dict.fromkeys(kinds))
            options[name] = (each * 2)[: max(2, len(each))]
            options["num_hidden_layers"] = max(options.get("num_hidden_layers", 2), len(each))
    return options


def _can_be_set(config_class: Any, name: str) -> bool:
    alias_of = (getattr(config_class, "attribute_map", None) or {}).get(name)
    found = getattr(config_class, name, None)
    return alias_of is None and (not isinstance(found, property) or found.fset is not None)
