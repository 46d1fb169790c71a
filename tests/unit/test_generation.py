"""Generation in one process: greedy and drawn texts, independent of batches, for rotary and learned positions."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation.generate import Decoding, generate_texts, generation_config

TOKENIZER = make_tokenizer(64)
PROMPTS = [[1, 60, 61], [1], [1, 99, 98, 97, 96]]
DRAWN = Decoding(sample=True, temperature=1.0, top_k=50)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, initializer_range=0.5, **shape)).train()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """Large weights: positions then decide what is said."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def texts_of(model: nn.Module, num_tokens: int = 6, batch_size: int = 3, decoding: Decoding | None = None) -> list[str]:
    return generate_texts(model, PROMPTS, TOKENIZER, num_tokens, batch_size, "cpu", decoding or Decoding()).texts


def greedy_step_by_step(model: nn.Module, num_tokens: int) -> list[str]:
    """Every prompt alone, without padding and without cache."""
    texts = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + num_tokens and (len(ids) == len(prompt) or ids[-1] != 2):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_equals_the_likeliest_token_step_by_step(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    assert texts_of(model, 8) == greedy_step_by_step(model, 8)


def test_generation_is_greedy_whatever_the_model_suggests(llama: LlamaForCausalLM) -> None:
    plain = texts_of(llama)
    suggested = GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, min_length=50, suppress_tokens=list(range(3, 130))
    )
    llama.generation_config = suggested
    assert texts_of(llama) == plain
    assert llama.generation_config is suggested
    assert llama.training


def test_drawn_texts_follow_from_the_seed_and_leave_the_random_state_alone(llama: LlamaForCausalLM) -> None:
    state = torch.random.get_rng_state()
    first = texts_of(llama, 12, decoding=DRAWN)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(random.randrange(2**31))
    assert texts_of(llama, 12, decoding=DRAWN) == first
    others = [texts_of(llama, 12, decoding=Decoding(True, 1.0, 50, 0.95, seed)) for seed in (7, 8)]
    assert first != others[0] != others[1]
    assert first != texts_of(llama, 12)


def test_tokens_are_counted_up_to_the_end_of_each_text(llama: LlamaForCausalLM) -> None:
    llama.generation_config.eos_token_id = list(range(202, 222))  # so many ends that some texts stop soon
    together = generate_texts(llama, PROMPTS, TOKENIZER, 16, 3, "cpu")
    alone = [generate_texts(llama, [prompt], TOKENIZER, 16, 1, "cpu") for prompt in PROMPTS]
    assert together.num_tokens == sum(one.num_tokens for one in alone)
    assert len({one.num_tokens for one in alone}) > 1
    assert together.seconds > 0

    # An answer ends with its first end token, which counts.
    ends = set(range(202, 222)) | {TOKENIZER.eos_token_id}
    for prompt, ids in zip(PROMPTS, together.token_ids, strict=True):
        text = [int(llama(torch.tensor([[*prompt, *ids[:n]]])).logits[0, -1].argmax()) for n in range(len(ids))]
        assert ids == text
        assert len(ids) == 16 or ids[-1] in ends
        assert not ends & set(ids[:-1])
    assert together.num_tokens == sum(map(len, together.token_ids))


def test_a_drawn_text_depends_on_its_prompt_and_its_place_alone(llama: LlamaForCausalLM) -> None:
    """Not on what was generated before: ranks share the prompts out. The longest come first."""
    texts = texts_of(llama, 12, batch_size=1, decoding=DRAWN)
    for place, prompt in enumerate(PROMPTS):
        alone = replace(DRAWN, seed=DRAWN.seed + place)
        assert generate_texts(llama, [prompt], TOKENIZER, 12, 1, "cpu", alone).texts == [texts[place]]


def test_generation_edges(llama: LlamaForCausalLM) -> None:
    nothing = generate_texts(llama, [], TOKENIZER, 5, 3, "cpu")
    assert (nothing.texts, nothing.num_tokens) == ([], 0)
    with pytest.raises(ValueError, match="at least one token id"):
        generate_texts(llama, [[1], []], TOKENIZER, 5, 3, "cpu")
    llama.generation_config.eos_token_id = [7, 5]
    assert generation_config(llama, TOKENIZER, 3).eos_token_id == [2, 5, 7]
