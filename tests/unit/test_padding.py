"""Padding changes no loss and no answer, whatever the class of the model; a model that sees its answers is refused."""

import logging
from typing import Any

import pytest
import torch
from support.causal_classes import PAD, VOCAB, model_types, tiny_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from piece_ds.data.collate import Collator
from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation.generate import generate_texts
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.evaluation.padding import check_rows
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

# Learned positions of several kinds, positions counted from the padding token, recurrences, convolutions, leaks.
NAMED = [
    *("llama", "gpt2", "opt", "gpt_bigcode", "openai-gpt", "biogpt", "xglm", "ctrl", "bart", "mbart", "pegasus"),
    *("marian", "blenderbot", "trocr", "whisper", "roberta", "camembert", "xlm-roberta", "data2vec-text", "rwkv"),
    *("recurrent_gemma", "mamba", "falcon_mamba", "zamba2", "lfm2", "deepseek_v4"),
]
REFUSED = {"cpmant": "sees the answers", "xlm": "sees the answers", "xlnet": "sees the answers"}
REFUSED |= {"prophetnet": "one row at a time"}

LENGTHS = (7, 18, 11)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 50, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in ids]


def loss_of(model: nn.Module, together: bool) -> float:
    """Nats over all rows, in one batch or one row at a time."""
    sums = [evaluate_loss(model, part, Collator(PAD), 3, "cpu").sum_loss for part in _parts(together)]
    return sum(sums)


def _parts(together: bool) -> list[Any]:
    return [rows()] if together else [[row] for row in rows()]


def refusal_of(model: nn.Module, one_row_at_a_time: bool) -> str:
    try:
        check_rows(model, list(range(5, 16)), PAD, one_row_at_a_time)
    except UserError as error:
        return str(error)
    return ""


def fault_of_loss(model_type: str, model: nn.Module) -> str:
    """What padding does to the loss of a model that is not refused by its name; '' if nothing."""
    refusal = refusal_of(model, one_row_at_a_time=False)
    if refusal or model_type in REFUSED:
        right = REFUSED.get(model_type, "-") in refusal and type(model).__name__ in refusal
        if "one row at a time" in refusal:
            right = right and not refusal_of(model, one_row_at_a_time=True)
        return "" if right else f"{model_type}: {refusal or 'not refused'}"
    alone, together = loss_of(model, together=False), loss_of(model, together=True)
    return "" if together == pytest.approx(alone, rel=2e-5) else f"{model_type}: loss {together}, alone {alone}"


def fault_of_answers(model_type: str, model: nn.Module) -> str:
    tokenizer, prompts = make_tokenizer(64), [row["input_ids"] for row in rows()]
    together = generate_texts(model, prompts, tokenizer, 4, 3, "cpu").texts
    alone = [generate_texts(model, [prompt], tokenizer, 4, 1, "cpu").texts[0] for prompt in prompts]
    return "" if together == alone else f"{model_type}: {together}, alone {alone}"


def test_padding_changes_no_loss_of_the_classes_that_are_known_for_it() -> None:
    faults = [fault_of_loss(model_type, tiny_model(model_type)) for model_type in (*NAMED, *REFUSED)]
    assert not [fault for fault in faults if fault]


def test_answers_are_those_of_the_prompt_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for model_type in ("llama", "gpt2", "bart", "rwkv", "whisper", "deepseek_v4"):
            assert not fault_of_answers(model_type, tiny_model(model_type))
    one_at_a_time = [record.args[0] for record in caplog.records if "one at a time" in record.getMessage()]
    assert one_at_a_time == ["BartForCausalLM", "RwkvForCausalLM", "WhisperForCausalLM", "DeepseekV4ForCausalLM"]


@pytest.mark.slow
def test_padding_changes_no_loss_and_no_answer_of_any_causal_class() -> None:
    """All but a few, which cannot be built from their configuration's defaults, are tried."""
    tried, not_built, faults = [], {}, []
    for model_type in model_types():
        try:
            model = tiny_model(model_type)
            model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]))
        except Exception as error:
            not_built[model_type] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        tried.append(model_type)
        faults.append(fault_of_loss(model_type, model))
        if model_type not in REFUSED:
            faults.append(fault_of_answers(model_type, model))
    assert not [fault for fault in faults if fault]
    assert len(tried) > 5 * len(not_built), not_built


def test_an_encoder_loaded_as_a_causal_model_is_refused_at_any_precision() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=VOCAB, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = BertLMHeadModel(config).to(dtype)
        with pytest.raises(UserError, match="BertLMHeadModel sees the answers that it shall learn"):
            check_rows(model, [5, 6], PAD, one_row_at_a_time=True)


def test_rounding_is_not_taken_for_padding() -> None:
    for model_type in ("llama", "gpt2", "mixtral", "qwen3_moe", "gemma2", "bloom", "falcon_mamba"):
        for dtype in (torch.bfloat16, torch.float16):
            check_rows(tiny_model(model_type).to(dtype), list(range(5, 16)), PAD, one_row_at_a_time=False)


def test_rounding_of_many_layers_is_measured_not_guessed() -> None:
    """In bf16, kernels for a batch with a mask differ from those for a row alone by more than any fixed bound."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=30, initializer_range=0.2, **shape)
    check_rows(LlamaForCausalLM(config).to(torch.bfloat16).eval(), list(range(5, 16)), PAD, one_row_at_a_time=False)
    # generate() gives logits in fp32 whatever the model computes in.
    prompts = [row["input_ids"] for row in rows()]
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    generate_texts(model, prompts, make_tokenizer(64), 2, 3, "cpu")
    assert model._piece_ds_answers_alone is False
