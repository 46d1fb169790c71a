"""The loss of a causal model without the logits of all its tokens.

Logits take (tokens x vocabulary) numbers, several times over: 2048 tokens of a vocabulary of 262144 are 2 GiB in fp32.
But only answer tokens have a loss, and a token's loss needs only its own logits. So the head runs on answer tokens
alone, N at a time, and keeps nothing: backward runs it again (torch.utils.checkpoint). Loss and gradients are those of
the model's own forward within rounding. The head is called as a module, so whatever hooks it (ZeRO-3, sampled
gradients) sees every use.

What a model's forward does between head and loss must be known. So this is for the families that
tests/unit/test_chunked_loss.py proves; every other model keeps its own forward, and the log says so.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.runtime.distributed import all_reduce_max_, collective_device, is_main
from piece_ds.state.partition import is_partitioned

logger = logging.getLogger(__name__)

# model_type, in transformers' configurations, of the families that are proven.
PROVEN = frozenset(
    (
        *("apertus", "arcee", "bamba", "bitnet", "bloom", "cohere", "cohere2", "cohere2_moe", "cwm"),
        *("deepseek_v2", "deepseek_v3", "diffllama", "doge", "ernie4_5", "ernie4_5_moe", "exaone4"),
        *("exaone_moe", "falcon", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text"),
        *("gemma3n_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neo"),
        *("gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared"),
        *("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "lfm2_moe", "llama"),
        *("mamba", "mamba2", "minimax", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "mpt"),
        *("nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt"),
        *("persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text"),
        *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        *("vaultgemma", "zamba", "zamba2"),
    )
)

# Arguments of forward() that ask for more than the loss.
_ASKS_FOR_MORE = ("logits_to_keep", "output_hidden_states", "output_attentions", "output_router_logits", "shift_labels")


def install_chunked_loss(model: nn.Module, chunk_tokens: int) -> bool:
    """Give a model's forward() a loss in chunks, if its family is proven; else say why not. Return whether it has one.

    Args:
        model: of transformers, before it has an engine. With labels, forward() then returns no logits.
        chunk_tokens: tokens whose logits are held at once; 0 leaves the model alone.
    """
    if chunk_tokens == 0:
        return False
    reason = reason_against(model)
    if reason is not None:
        if is_main():
            logger.warning("--loss_chunk_tokens: %s, so the logits of all its tokens are held", reason)
        return False
    forward: Any = model.forward
    loss = _ChunkedLoss(model, chunk_tokens)

    # The Trainer reads the signature to know which columns and arguments a model takes.
    @functools.wraps(forward)
    def forward_with_loss(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("labels") is None or any(kwargs.get(name) for name in _ASKS_FOR_MORE):
            return forward(*args, **kwargs)
        return loss(**kwargs)

    model.forward = forward_with_loss
    return True


def reason_against(model: Any) -> str | None:
    """Return why a model keeps its own loss, or None."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in PROVEN:
        return f"the loss in chunks is not proven for models of type {kind!r}"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has a loss of its own"
    if getattr(model.config, "output_router_logits", False):
        return "the model's loss has a part for its router (output_router_logits)"
    if model.get_output_embeddings() is None:
        return "the model has no output head"
    return None


class _ChunkedLoss:
    """The forward pass of one model with labels."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        self._model, self._chunk_tokens = model, chunk_tokens
        self._after_head = _after_head(model)

    def __call__(self, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> CausalLMOutputWithPast:
        """Return what forward() returns, with the loss and without logits.

        Args:
            labels: as forward() takes them, int64, (rows, tokens).
            num_items_in_batch: what the sum of losses is divided by; None means the number of counted labels.
            inputs: whatever else forward() takes.
        Cost: the host waits once for the number of answer tokens. Under ZeRO-3 the ranks also agree on a number of
            chunks, since each of them gathers the head: an all-reduce of one number.
        """
        kept = {name: value for name, value in inputs.items() if name not in _ASKS_FOR_MORE}
        outputs = self._model.base_model(**kept)
        hidden_BTH = outputs[0]

        # A token predicts the next one, so a row's first label never counts.
        targets_BT = labels[:, 1:].to(hidden_BTH.device)
        counted = targets_BT != IGNORED_LABEL
        hidden_NH, targets_N = hidden_BTH[:, :-1][counted], targets_BT[counted]

        # Each chunk's sum in fp32, then the mean.
        total = torch.zeros((), dtype=torch.float32, device=hidden_BTH.device)
        num_chunks = self._num_chunks(targets_N.numel())
        for start in range(0, num_chunks * self._chunk_tokens, self._chunk_tokens):
            chunk = slice(start, start + self._chunk_tokens)
            total = total + self._sum(hidden_NH[chunk], targets_N[chunk], again=num_chunks > 1)
        divisor: Any = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
        divisor = (
            divisor.to(total.device) if isinstance(divisor, Tensor) else torch.tensor(divisor, device=total.device)
        )
        return CausalLMOutputWithPast(loss=total / divisor, past_key_values=outputs.get("past_key_values"))

    def _num_chunks(self, num_tokens: int) -> int:
        """Return how often the head runs: at least once, and equally often on all ranks if ZeRO-3 gathers it."""
        num_chunks = max(1, -(-num_tokens // self._chunk_tokens))
        if is_partitioned(*self._model.get_output_embeddings().parameters()):
            num_chunks = int(all_reduce_max_(torch.tensor([num_chunks], device=collective_device())))
        return num_chunks

    def _sum(self, hidden_NH: Tensor, targets_N: Tensor, again: bool) -> Tensor:
        """Return the sum of the tokens' losses. again: backward runs the head again, so that its output is not kept."""
        if not (again and torch.is_grad_enabled()):
            return self._sum_now(hidden_NH, targets_N)
        found: Tensor = checkpoint(self._sum_now, hidden_NH, targets_N, use_reentrant=False)
        return found

    def _sum_now(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = self._after_head(self._model.get_output_embeddings()(hidden_NH))
        return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def _after_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return what a model's forward does to the logits of its head: it scales them, bounds them, or nothing."""
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2 and later
        return lambda logits: torch.tanh(logits / cap) * cap
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        return lambda logits: logits / config.logits_scaling
    if getattr(model, "logit_scale", None) is not None:  # Cohere
        return lambda logits: logits * model.logit_scale
    return lambda logits: logits
