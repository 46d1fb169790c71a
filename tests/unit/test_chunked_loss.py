"""The loss in chunks: loss and every gradient of the model's own forward, for every family that is proven."""

import inspect
import logging
from typing import Any

import pytest
import torch
from support.causal_classes import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig

from piece_ds.config.settings import parse
from piece_ds.evaluation import chunked_loss
from piece_ds.evaluation.chunked_loss import PROVEN, install_chunked_loss
from piece_ds.preflight.checks import check_loss_chunks
from piece_ds.runtime.errors import UserError

# What families do between head and loss, and one of each other kind.
FEW = ("llama", "gemma2", "cohere", "granite", "gpt2", "mamba", "mixtral", "opt", "nanochat")
NOT_PROVEN = ("falcon_h1", "bert", "whisper", "xlnet", "recurrent_gemma", "hyperclovax")


def make(family: str) -> Any:
    """A tiny model whose logits are large, scaled and bounded, so that a forgotten factor shows."""
    model: Any = tiny_model(family)
    for name, value in (("final_logit_softcapping", 2.0), ("logits_scaling", 3.0)):
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    if hasattr(model, "logit_scale"):
        model.logit_scale = 0.3
    with torch.no_grad():
        for param in model.get_output_embeddings().parameters():
            param.mul_(5.0)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(4, 58, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1, 8:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model: nn.Module, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def error_of(family: str) -> float:
    model, inputs = make(family), batch()
    plain, items = loss_and_gradients(model, **inputs), {"num_items_in_batch": torch.tensor(29)}
    shared = loss_and_gradients(model, **inputs, **items)[0]
    assert install_chunked_loss(model, 3), chunked_loss.reason_against(model)
    chunked = loss_and_gradients(model, **inputs)
    assert plain[1].keys() == chunked[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in plain[1].values())
    errors = [float((plain[1][name] - chunked[1][name]).abs().max()) / scale for name in plain[1]]
    errors += [abs(plain[0] / chunked[0] - 1), abs(shared / loss_and_gradients(model, **inputs, **items)[0] - 1)]
    return max(errors)


def test_loss_and_gradients_are_those_of_the_models_own_forward() -> None:
    assert {family: error for family in FEW if (error := error_of(family)) > 2e-5} == {}


def test_a_head_that_trains_alone_gets_its_whole_gradient() -> None:
    """Then nothing before the head needs one."""
    model, inputs = make("llama"), batch()
    model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    plain = loss_and_gradients(model, **inputs)
    assert install_chunked_loss(model, 3)
    chunked = loss_and_gradients(model, **inputs)
    assert list(plain[1]) == list(chunked[1]) == ["lm_head.weight"]
    torch.testing.assert_close(chunked[1]["lm_head.weight"], plain[1]["lm_head.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_family_that_is_proven_is() -> None:
    assert {family: error for family in sorted(PROVEN) if (error := error_of(family)) > 2e-5} == {}


def test_other_families_keep_their_forward_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for family in NOT_PROVEN:
        assert family not in PROVEN
        model: Any = nn.Module()
        model.config = AutoConfig.for_model(family)
        with caplog.at_level(logging.WARNING):
            assert not install_chunked_loss(model, 8)
        assert f"models of type '{family}'" in caplog.messages[-1]
    router = tiny_model("mixtral")
    router.config.output_router_logits = True
    assert not install_chunked_loss(router, 8)
    assert "router" in caplog.messages[-1]


def test_what_asks_for_more_than_the_loss_gets_the_models_own_outputs() -> None:
    model, inputs = make("llama"), batch()
    assert install_chunked_loss(model, 3)
    without = {name: value for name, value in inputs.items() if name != "labels"}
    assert model(**without).logits.shape == (2, 11, 64)
    assert model(**inputs, output_hidden_states=True).logits is not None
    assert model(**inputs).logits is None
    # The Trainer reads the signature for what the model accepts.
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD in kinds
    assert "labels" in inspect.signature(model.forward).parameters


def test_a_batch_without_an_answer_token_is_as_before() -> None:
    model, inputs = make("llama"), batch()
    inputs["labels"][:] = -100
    assert install_chunked_loss(model, 3)
    assert torch.isnan(model(**inputs).loss)
    loss = model(**inputs, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    assert all(not param.grad.any() for param in model.parameters() if param.grad is not None)


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    """The largest tensor that the head makes, in forward and in backward."""
    model, inputs, sizes = make("llama"), batch(), []
    assert install_chunked_loss(model, 3)
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape)))
    loss_and_gradients(model, **inputs)
    assert set(sizes) <= {(3, 64), (2, 64), (1, 64)}
    assert len(sizes) == 2 * 5  # 14 answer tokens in 5 chunks, each once more in backward


def test_flags_that_need_logits_exclude_it() -> None:
    for flags, message in (
        (["--loss_chunk_tokens", "-1"], "--loss_chunk_tokens must be 0 or more"),
        (["--loss_chunk_tokens", "8", "--method", "lwf"], "--loss_chunk_tokens has no meaning with --method lwf"),
        (["--loss_chunk_tokens", "8", "--general_kl", "1"], "--loss_chunk_tokens has no meaning with --general_kl"),
    ):
        with pytest.raises(UserError, match=message):
            check_loss_chunks(parse(flags))
    check_loss_chunks(parse(["--loss_chunk_tokens", "8", "--method", "ewc"]))
