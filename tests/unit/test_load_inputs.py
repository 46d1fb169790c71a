"""load_inputs(): each check and each reader gets what the flags, the configuration and the earlier readers say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.fakes import faked
from transformers import TrainingArguments

from piece_ds.config.settings import Settings, parse
from piece_ds.preflight import inputs as module
from piece_ds.preflight.inputs import Inputs, load_inputs
from piece_ds.runtime.errors import UserError

# All that reads or checks, in the order in which it is called: cheapest first.
CALLED = (
    "check_deepspeed_file", "load_config", "bring_weights", "require_weights", "check_checkpoint",
    "check_generation_settings", "check_attention_of", "check_mask", "check_method_reads_images",
    "warn_of_stacked_experts", "check_eligible", "check_general_text", "with_rate", "check_packing", "_tokenizer",
    "check_processor", "parse_scorers", "check_ability", "_seed", "load_task_stream", "choose_scorers", "load_general",
    "read_general_text", "tokenizer_of", "check_rows_fit", "check_prompts_fit", "start_distributed", "dtype_of",
    "with_precision", "write_general_text", "judged_apart", "check_base_logits",
)  # fmt: skip
FLAGS = {
    "model_name_or_path": "m",
    "trust_remote_code": True,
    "attn_implementation": "eager",
    "method": "piece-f",
    "unit": "row",
    "deepspeed": "ds.json",
    "packing": True,
    "scorers": "first=exact",
    "general_file": "general.jsonl",
    "max_prompt_len": 30,
    "max_ans_len": 11,
    "max_train_samples": 17,
    "max_eval_samples": 19,
    "max_new_tokens": 5,
    "max_new_tokens_text": 7,
    "ddp_timeout": 77,
}
TASKS = [
    SimpleNamespace(name="first", answers=["A"], has_images=False, generates=True),
    SimpleNamespace(name="second", answers=["B"], has_images=True, generates=True),
    SimpleNamespace(name="third", answers=["C"], has_images=False, generates=False),
    SimpleNamespace(name="fourth", answers=["D"], has_images=True, generates=False),
]


def made_of(**flags: Any) -> Settings:
    """The settings of FLAGS, with others in their place; None leaves one out."""
    given = {name: value for name, value in {**FLAGS, **flags}.items() if value is not None}
    return parse([word for name, value in given.items() for word in (f"--{name}", str(value))])


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    order = faked(monkeypatch, module, *CALLED)
    order.load_task_stream.return_value = TASKS
    order.parse_scorers.return_value = {"first": "exact"}
    order.choose_scorers.return_value = {"first": "exact", "second": "vqa", "third": "text", "fourth": "caption"}
    order.with_rate.return_value = made_of(learning_rate=0.25)
    order.with_precision.return_value = (made_of(learning_rate=0.25, seed=6, deepspeed=None), torch.float16)
    order.judged_apart.return_value = ("used", "judged")
    return order


def test_every_reader_and_check_gets_its_own(fakes: mock.Mock) -> None:
    given = made_of()
    found = load_inputs(given)
    rated, (final, dtype) = fakes.with_rate.return_value, fakes.with_precision.return_value
    config, tokenizer = fakes.load_config.return_value, fakes._tokenizer.return_value
    general, text = fakes.load_general.return_value, fakes.read_general_text.return_value
    scorers = {"first": "exact", "second": "vqa", "third": "loss", "fourth": "loss"}
    expected = {
        "check_deepspeed_file": ("ds.json",),
        "load_config": (given.model,),
        "bring_weights": (given.model,),
        "require_weights": (given.model,),
        "check_checkpoint": (given.model, config),
        "check_generation_settings": (given.model,),
        "check_attention_of": (given.model, config),
        "check_mask": (given, config),
        "check_method_reads_images": ("piece-f", config),
        "warn_of_stacked_experts": ("piece-f", "row", config, True),
        "check_eligible": (given.model, config),
        "check_general_text": (given, config),
        "with_rate": (given, config),
        "check_packing": (config, "eager"),
        "_tokenizer": (rated, config),
        "check_processor": (tokenizer,),
        "check_ability": (rated.evaluation,),
        "_seed": (rated,),
        "load_task_stream": (rated.data, tokenizer, fakes._seed.return_value),
        "choose_scorers": ([(task.name, task.answers) for task in TASKS], "first=exact", ["second", "fourth"]),
        "read_general_text": (rated, tokenizer),
        "tokenizer_of": (tokenizer,),
        "check_rows_fit": (
            *(config, TASKS, {"--general_file": general, "--general_text": text}),
            fakes.tokenizer_of.return_value.pad_token_id,
        ),
        "check_prompts_fit": (config, TASKS, scorers, (5, 7)),
        "start_distributed": (77.0,),
        "dtype_of": (rated.model, config),
        "with_precision": (rated, fakes.dtype_of.return_value),
        "judged_apart": (final, general, text),
        "check_base_logits": (final, config, "used", dtype),
    }
    for name, arguments in expected.items():
        getattr(fakes, name).assert_called_once_with(*arguments)
    assert set(map(str, fakes.parse_scorers.mock_calls)) == {str(mock.call("first=exact"))}
    fakes.load_general.assert_called_once_with("general.jsonl", tokenizer, 41, max_rows=19, images=rated.data)
    assert not fakes.write_general_text.mock_calls

    # Cheapest first, and nothing that reads data before the flags are known to be good.
    order = [call[0] for call in fakes.mock_calls if call[0] in CALLED]
    assert [name for n, name in enumerate(order) if name not in order[:n]] == [
        name for name in CALLED if name != "write_general_text"
    ]
    arguments = found.arguments
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.seed, arguments.learning_rate) == (6, 0.25)
    assert found == Inputs(
        settings=final,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        tasks=TASKS,  # type: ignore[arg-type]
        scorers=scorers,
        general=general,
        general_importance="used",  # type: ignore[arg-type]
        judged="judged",  # type: ignore[arg-type]
        arguments=arguments,
    )


def test_without_general_text_the_model_may_write_it_once_ranks_talk(fakes: mock.Mock) -> None:
    fakes.read_general_text.return_value = None
    load_inputs(made_of())
    final, dtype = fakes.with_precision.return_value
    fakes.write_general_text.assert_called_once_with(final, fakes._tokenizer.return_value, dtype)
    fakes.judged_apart.assert_called_once_with(
        final, fakes.load_general.return_value, fakes.write_general_text.return_value
    )
    assert fakes.check_rows_fit.call_args.args[2]["--general_text"] is None


def test_what_is_not_asked_for_is_not_read(fakes: mock.Mock) -> None:
    settings = fakes.with_rate.return_value = made_of(general_file=None, packing=None)
    found = load_inputs(settings)
    assert found.general is None
    assert fakes.check_rows_fit.call_args.args[2]["--general_file"] is None
    assert fakes.judged_apart.call_args.args[1] is None
    assert not fakes.load_general.mock_calls
    assert not fakes.check_packing.mock_calls


def test_a_scorer_that_is_asked_for_is_kept_where_nothing_is_generated(fakes: mock.Mock) -> None:
    fakes.parse_scorers.return_value = {"third": "text"}
    assert load_inputs(made_of()).scorers == {"first": "exact", "second": "vqa", "third": "text", "fourth": "loss"}


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("token_ids", [False, True])
def test_rows_of_token_ids_need_no_tokenizer(
    token_ids: bool, images: bool, loads: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fakes = faked(monkeypatch, module, "load_tokenizer", "reads_images", "holds_token_ids", "token_ids_tokenizer")
    fakes.reads_images.return_value, fakes.holds_token_ids.return_value = images, token_ids
    fakes.load_tokenizer.side_effect = None if loads else UserError("no tokenizer")
    settings, config = made_of(), object()
    if not loads and (images or not token_ids):
        with pytest.raises(UserError, match="no tokenizer"):
            module._tokenizer(settings, config)
        return
    own = fakes.token_ids_tokenizer.return_value
    assert module._tokenizer(settings, config) is (fakes.load_tokenizer.return_value if loads else own)
    fakes.load_tokenizer.assert_called_once_with(settings.model, config)
    assert fakes.token_ids_tokenizer.mock_calls == [mock.call(config)] * (not loads)
    assert fakes.reads_images.mock_calls == [mock.call(config)] * (not loads)
    assert fakes.holds_token_ids.mock_calls == [mock.call(settings.data)] * (not loads)
    assert ("m has no tokenizer" in caplog.text) != loads


@pytest.mark.parametrize(
    ("given", "seed"),
    [({"seed": 9, "data_seed": 8}, 9), ({}, 42), ({"seed": "0x9"}, 42), ({"seed": "9" * 20}, 42), ({"seed": "²"}, 42)],
)
def test_the_seed_is_read_before_it_is_checked(given: dict[str, Any], seed: int) -> None:
    assert module._seed(made_of(**given)) == seed


@pytest.mark.parametrize("size", [None, 0.5])
def test_a_recipes_rate_is_in_proportion_to_this_models_weights(
    size: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fakes = faked(monkeypatch, module, "model_source", "vocabulary_of", "size_of_files", "rate_in_proportion")
    fakes.size_of_files.return_value, fakes.rate_in_proportion.return_value = size, 0.125
    settings, config = made_of(recipe="full", method=None), object()
    rated = module.with_rate(settings, config)
    fakes.model_source.assert_called_once_with("m")
    fakes.vocabulary_of.assert_called_once_with(config)
    fakes.size_of_files.assert_called_once_with(fakes.model_source.return_value, fakes.vocabulary_of.return_value)
    assert "--recipe full" in caplog.text
    if size is None:
        assert rated is settings
        assert not fakes.rate_in_proportion.mock_calls
    else:
        fakes.rate_in_proportion.assert_called_once_with(settings.recipe_rate, 0.5)
        assert rated.flag("learning_rate") == "0.125"
    own = made_of(recipe="full", method=None, learning_rate=0.5)
    assert module.with_rate(own, config) is own


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("flags", "files", "dtype", "added"),
    [
        ({"bf16": True}, torch.float32, torch.bfloat16, ""),
        ({"fp16": True}, torch.bfloat16, torch.float16, ""),
        ({}, torch.bfloat16, torch.bfloat16, "bf16"),
        ({}, torch.float16, torch.float16, "fp16"),
        ({}, torch.float32, torch.float32, ""),
    ],
)
def test_the_precision_is_the_flags_or_the_files(
    flags: dict[str, bool], files: torch.dtype, dtype: torch.dtype, added: str, slow: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fakes = faked(monkeypatch, module, "bf16_is_slow")
    fakes.bf16_is_slow.return_value = slow
    settings = made_of(**flags, deepspeed=None, use_cpu=True)  # bf16 without it needs a GPU
    found, chosen = module.with_precision(settings, files)
    assert chosen == dtype
    assert (found is settings) == (not added)
    assert {name for name in ("bf16", "fp16") if found.flag(name) == "True"} == {*flags, *([added] if added else [])}
    assert (f"training with --{added}" in caplog.text) == bool(added)
    assert ("no AVX-512" in caplog.text) == (slow and dtype == torch.bfloat16)


def test_the_one_file_of_a_command_is_the_flags(tmp_path: Path, fakes: mock.Mock) -> None:
    fakes.with_precision.return_value = (made_of(output_file=tmp_path / "mask", deepspeed=None), torch.float16)
    assert load_inputs(made_of()).output_file == tmp_path / "mask"
