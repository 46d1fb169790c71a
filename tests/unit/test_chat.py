"""Conversations as token ids: transformers' own ids, and loss on the assistant's turns whichever way they are found."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from piece_ds.data.chat import ChatTemplate
from piece_ds.data.tokenize import Encoder, row_encoder
from piece_ds.data.turn_end import turn_end_id
from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation.generate import generation_config
from piece_ds.runtime.errors import UserError

ONE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yo you"}]
TWO = [*ONE, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "more, é"}]

# TRL's templates that mark the assistant's turns just as a template without marks divides them. The others mark what
# the prompt already holds (a first line end, empty thoughts, the assistant's name), or are for images.
ALLOW_BOTH = [
    "cohere",
    "cohere2",
    "gemma",
    "gemma3",
    "glm4moe",
    "lfm2",
    "lfm2_v2",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_vl",
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(4096)


def trl_templates() -> Path:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed: its chat templates are what is compared")
    return Path(spec.origin).parent / "chat_templates"


def unmarked(template: str) -> str:
    """The same template without its marks of what the assistant generates."""
    begun = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", begun)


def test_turn_by_turn_equals_the_templates_own_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ALLOW_BOTH:
        template = (trl_templates() / f"{name}_training.jinja").read_text()
        marked, plain = ChatTemplate(tokenizer, template), ChatTemplate(tokenizer, unmarked(template))
        assert (marked.marks_generation, plain.marks_generation) == (True, False)
        for messages in (ONE, TWO):
            row = marked.encode(messages, "row")
            assert row == plain.encode(messages, "row"), name
            assert (
                row["input_ids"]
                == tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
            )
            learned = tokenizer.decode([label for label in row["labels"] if label != -100])
            assert all(message["content"] in learned for message in messages[1::2])
            assert not any(message["content"] in learned for message in messages[0::2])


def test_templates_that_write_earlier_turns_otherwise_are_divided_too(tokenizer: PreTrainedTokenizerFast) -> None:
    """Qwen3 puts empty thoughts before the last turn alone; Nemotron's prompt opens thoughts that the row closes."""
    for name, learned in {
        "qwen3": "yo you<|im_end|>\n<think>\n\n</think>\n\nmore, é<|im_end|>\n",
        "nemotron_3_nano": "</think>yo you<|im_end|>\n</think>more, é<|im_end|>\n",
    }.items():
        row = ChatTemplate(tokenizer, (trl_templates() / f"{name}.jinja").read_text()).encode(TWO, "row")
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == learned


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def test_turns_of_the_context_give_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (PLAIN, PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")):
        row = ChatTemplate(tokenizer, template).encode(TWO, "row", num_context=3)
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert "more, é" in learned
        assert "yo" not in learned


def test_templates_that_fail_are_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    for template, reason in {
        "{{ raise_exception('Conversation roles must alternate') }}": "roles must alternate",
        "{% for m in messages %}": "chat template cannot render the row",
        "{{ date.now() }}": "'date' is undefined",
        "{{ messages[9].content }}": "chat template cannot render the row",
        "{{ 1 / 0 }}": "division by zero",
        "{{ '\ud800' }}{{ messages[1].content }}": "surrogates not allowed",
        "{{ tools[0].name }}": "None has no element 0",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
        "nothing": "leaves out what turn 1 says, the user's",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "what turn 2 says, the assistant's",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}": "rewrites what stands",
        "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}": "no token of the",
    }.items():
        with pytest.raises(UserError, match=reason) as refusal:
            ChatTemplate(tokenizer, template).encode(TWO, "a.jsonl row 3")
        assert str(refusal.value).startswith("a.jsonl row 3: ")
        assert "\n" not in str(refusal.value)


ALWAYS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"


def test_a_template_that_always_begins_another_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its generation prompt stands behind the last answer too, and would be learned as what ends it."""
    with pytest.raises(UserError, match=r"row 1: .*begins another answer \('assistant>'\), asked or not"):
        ChatTemplate(tokenizer, ALWAYS).encode(ONE, "row 1")
    ended = "{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
    with pytest.raises(UserError, match=r"row 1: .*begins another answer \('assistant>'\), asked or not"):
        ChatTemplate(tokenizer, ALWAYS + ended).encode(ONE, "row 1")
    asked = ALWAYS.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    for template in (asked, PLAIN, "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"):
        row = ChatTemplate(tokenizer, template).encode(ONE, "row 1")
        assert tokenizer.decode([label for label in row["labels"] if label != -100]).endswith("yo you</s>")


def test_an_earlier_turn_that_is_no_longer_what_it_was_as_the_last_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Another end, or another beginning: neither is found where the shorter conversation has it."""
    for answer in (
        "{{ m.content }}{{ '!' if loop.last else '|' }}",
        "{{ '' if loop.last else '(old) ' }}{{ m.content }}",
        "{{ '' if loop.last else '(old) ' }}{{ m.content }}{{ '!' if loop.last else '|' }}",
    ):
        turn = "{% if m.role == 'assistant' %}" + answer + "{% else %}[user]{{ m.content }}[assistant]{% endif %}"
        template = ChatTemplate(tokenizer, "{% for m in messages %}" + turn + "{% endfor %}")
        with pytest.raises(UserError, match=r"^row 1: the chat template rewrites what stands before or in turn 2 "):
            template.encode(TWO, "row 1")
        learned = [label for label in template.encode(ONE, "row 1")["labels"] if label != -100]
        assert tokenizer.decode(learned).startswith("yo you")


def test_what_ends_a_conversation_is_learned_where_the_template_writes_its_prompt_only_when_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Here the prompt and the end of a conversation are the same text; and no answer comes before a first one."""
    last = "{% if loop.last and m.role == 'assistant' %}##{% endif %}"
    turns = "{% for m in messages %}{% if m.role == 'user' %}Q: {% else %}##{% endif %}{{ m.content }}" + last
    template = "{{ messages[0].role[:0] }}" + turns + "{% endfor %}{% if add_generation_prompt %}##{% endif %}"
    for messages, expected in ((ONE, "yo you##"), (ONE[1:], "##yo you##")):
        row = ChatTemplate(tokenizer, template).encode(messages, "row 1")
        assert tokenizer.decode([label for label in row["labels"] if label != -100]).endswith(expected)


def test_what_a_row_says_is_in_the_conversation_once(tokenizer: PreTrainedTokenizerFast) -> None:
    no_system = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out what turn 1 says, the system's"):
        ChatTemplate(tokenizer, no_system).encode([{"role": "system", "content": "Be brief."}, *ONE], "row 1")
    # Rows that were made with a template already.
    begun = "{{ bos_token }}" + PLAIN
    for turns, token in (
        ([{"role": "user", "content": "<s>hello"}, ONE[1]], "<s>"),
        ([ONE[0], {"role": "assistant", "content": "yo</s>"}], "</s>"),
    ):
        plain = begun if token == "</s>" else "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
        with pytest.raises(UserError, match=f"holds '{token}', which the chat template writes too"):
            ChatTemplate(tokenizer, plain).encode(turns, "row 1")
    encoder = Encoder(tokenizer, 64)
    assert encoder.pair("<s>hi", "yo</s>", "row 1") == encoder.pair("hi", "yo", "row 1")
    assert encoder.windows("<s>hi")[0]["input_ids"][:2] != [1, 1]


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for template, found in (
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}", end),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n<|im_end|>\n{% endfor %}", end),
        (PLAIN, tokenizer.eos_token_id),
        ("{% for m in messages %}{{ m.content }}. {% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ):
        tokenizer.chat_template = template
        assert turn_end_id(tokenizer) == found
        ends = generation_config(nn.Module(), tokenizer, 4).eos_token_id
        assert ends == sorted({tokenizer.eos_token_id, found} - {None})


def test_templates_that_do_not_write_the_prompt_are_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    for template, reason in {
        "hello": "does not write it",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}": "does not write it",
        "{% for m in messages %}{{ m.content[:3] }}{% endfor %}": "does not write it",
        "{{ range(90000) | random }}{% for m in messages %}{{ m.content }}{% endfor %}": "something else each time",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=reason):
            Encoder(tokenizer, 64, chat_template=True).prompt_ids("what is it?")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    assert Encoder(tokenizer, 64, chat_template=True).prompt_ids(" what is\nit? ")


def test_named_templates_without_a_default_are_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    with pytest.raises(UserError, match=r"row 1: the tokenizer's chat template cannot render") as refusal:
        Encoder(tokenizer, cutoff=64).conversation(ONE, 0, "row 1")
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="cannot render"):
        Encoder(tokenizer, cutoff=64, chat_template=True).prompt_ids("p")
    tokenizer.chat_template = {"default": PLAIN, "rag": "x"}
    assert "yo you" in tokenizer.decode(Encoder(tokenizer, cutoff=64).conversation(ONE, 0, "row 1")["input_ids"])


def test_a_conversation_is_cut_at_its_end_and_must_keep_something_to_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN
    whole = Encoder(tokenizer, cutoff=999).conversation(TWO, 0, "row")
    cut = Encoder(tokenizer, cutoff=25).conversation(TWO, 0, "row")
    assert cut == {name: ids[:25] for name, ids in whole.items()}
    with pytest.raises(UserError, match=r"row 7: no token to learn among the first 8 of"):
        Encoder(tokenizer, cutoff=8).conversation(TWO, 0, "row 7")


def test_completions_and_texts_are_what_trl_makes_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """Both texts as one with EOS behind, and loss from where the ids of the prompt alone part from them."""
    encoder = Encoder(tokenizer, cutoff=99)
    row = encoder.completion("ab ", "cd", "row")
    assert row["input_ids"] == tokenizer("ab cd</s>")["input_ids"]
    assert row["labels"] == [-100, -100, -100, *row["input_ids"][3:]]
    assert encoder.completion("ab ", "cd</s>", "row") == row
    assert encoder.documents("ab")[0]["input_ids"] == tokenizer("ab</s>")["input_ids"]
    assert encoder.completion("", "cd", "row")["labels"] == tokenizer("cd</s>")["input_ids"]


def test_in_a_template_a_completion_is_what_an_answer_is_and_its_row_is_named(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = PLAIN
    encoder = Encoder(tokenizer, cutoff=99, chat_template=True)
    for prompt, answer in (("what is it?", "a cat"), ("a", "b")):
        row = encoder.pair(prompt, answer, "row")
        assert tokenizer.decode(encoder.prompt_ids(prompt)) + f"{answer}</s>" == tokenizer.decode(row["input_ids"])
        for columns in ({"prompt": prompt, "completion": answer}, {"prompt": prompt, "answer": answer}):
            assert row_encoder(columns, encoder, documents=True)(columns, "row") == [row]
    for column in ("completion", "answer"):
        columns = {"prompt": "a", column: ""}
        with pytest.raises(UserError, match=r"^a\.json row 3: no answer token is left after tokenization of ''"):
            row_encoder(columns, encoder, documents=True)(columns, "a.json row 3")


def test_a_token_over_the_border_of_prompt_and_completion_is_learned() -> None:
    vocabulary = {token: number for number, token in enumerate(["</s>", "a", "b", "c", "d", "bc"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=False)
    row = Encoder(tokenizer, cutoff=9).completion("ab", "cd", "row")
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["a", "bc", "d", "</s>"]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
