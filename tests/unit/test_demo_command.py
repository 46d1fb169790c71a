"""The embedded default: each value of its recipes and of the user's flags reaches the run that it belongs to."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.fakes import faked

from piece_ds.cli import demo, office_demo
from piece_ds.cli.office_demo import Comparison, Contender
from piece_ds.config.settings import OF_METHOD, Settings, parse
from piece_ds.demo.office.recipe import CPU_RECIPE, SLOW_CPU_RECIPE, OfficeRecipe
from piece_ds.demo.office.write import OfficePaths
from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.write import EmbeddedPaths
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.evaluation.predictions import write_predictions
from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError
from piece_ds.training.run_folder import RunFolder

RANKS = 4


def unlike(recipe: Any, **besides: Any) -> Any:
    """A recipe whose numbers are all different, also divided among the ranks, and none is the default."""
    numbers = {
        field.name: 1000 + 8 * n if isinstance(field.default, int) else (n + 1) / 512
        for n, field in enumerate(fields(recipe))
        if isinstance(field.default, int | float)
    }
    assert not {field.name for field in fields(recipe) if numbers.get(field.name) == field.default}
    return recipe(**{**numbers, **besides})


RECIPE = unlike(EmbeddedRecipe)
OFFICE = unlike(OfficeRecipe, tasks=("orders", "queries"), leaves_out=("seqft + KL",))


def said(settings: Settings, names: Any) -> dict[str, str]:
    """Flag -> its value, as text: ours as parsed, TrainingArguments' as given."""
    return {
        name: str(next((getattr(part, name) for part in settings._ours() if hasattr(part, name)), settings.flag(name)))
        for name in names
    }


def texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def paths_in(folder: Path) -> EmbeddedPaths:
    return EmbeddedPaths(
        *(folder / name for name in ("untrained", "base.jsonl", "general.jsonl", "tasks")), ("first", "second")
    )


# The embedded default begins.


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_run_begins_where_the_flags_say_once_all_is_checked(
    named: bool, overwrite: bool, real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("start_distributed", "check_kernels", "resumes_from", "open_reporters", "_has_real_model", "run_office")
    fakes = faked(monkeypatch, demo, *names, "_run_small", "_default_folder")
    require_free = mock.create_autospec(RunFolder.require_free)
    monkeypatch.setattr(RunFolder, "require_free", require_free)
    fakes.resumes_from.return_value, fakes._has_real_model.return_value = "resumed", real
    fakes._default_folder.return_value = tmp_path / "default"
    fakes.run_office.return_value = Comparison(["of the office"], [], ())  # type: ignore[list-item]
    flags = ["--seed", "9", "--data_seed", "8", "--ddp_timeout", "77", "--method", "piece-f", "--report_to", "wandb"]
    flags += ["--output_dir", str(tmp_path / "mine")] if named else []
    settings = parse([*flags, "--overwrite_output_dir", str(overwrite)])
    runs, folder, comparison = demo.run_embedded(settings)

    # What was checked, before anything runs.
    root = tmp_path / ("mine" if named else "default")
    fakes.start_distributed.assert_called_once_with(77.0)
    arguments = fakes.check_kernels.call_args.args[1]
    fakes.check_kernels.assert_called_once_with("piece-f", arguments)
    assert (arguments.seed, arguments.report_to) == (9, ["wandb"])
    fakes.resumes_from.assert_called_once_with(arguments)
    assert fakes._default_folder.mock_calls == ([] if named else [mock.call("resumed")])
    fakes.open_reporters.assert_called_once_with(["wandb"], root)
    require_free.assert_called_once_with(RunFolder(root), "resumed", overwrite)
    assert folder == RunFolder(root)

    # What runs.
    if real:
        fakes.run_office.assert_called_once_with(settings, office_demo.MODEL, folder)
        assert (runs, comparison) == (["of the office"], fakes.run_office.return_value)
        assert not fakes._run_small.mock_calls
    else:
        fakes._run_small.assert_called_once_with(settings, folder, 9)
        assert (runs, comparison) == (fakes._run_small.return_value, None)
        assert not fakes.run_office.mock_calls


@pytest.mark.parametrize("flags", [["--train_file", "a.json"], ["--task_dir", "tasks", "--tasks", "a"]])
def test_data_without_a_model_is_refused_before_anything_starts(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, demo, "start_distributed")
    with pytest.raises(UserError, match="add --model_name_or_path"):
        demo.run_embedded(parse(flags))
    assert not fakes.mock_calls


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("fetched", [False, True])
def test_all_ranks_hear_from_one_whether_there_is_a_real_model(
    fetched: bool, main: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fakes = faked(monkeypatch, demo, "fetch", "is_main", "broadcast_object")
    fakes.is_main.return_value = main
    fakes.broadcast_object.side_effect = lambda value: value
    fakes.fetch.side_effect = None if fetched else demo.NotFetched("no index")
    assert demo._has_real_model() == (fetched or not main)  # another rank has nothing to say
    assert fakes.fetch.mock_calls == [mock.call(office_demo.MODEL)] * main
    fakes.broadcast_object.assert_called_once_with("no index" if main and not fetched else None)
    assert ("no index" in caplog.text) == (main and not fetched)
    fakes.broadcast_object.side_effect = lambda value: "of rank 0"
    assert not demo._has_real_model()


def test_a_new_run_takes_the_first_free_folder_and_a_resumed_one_the_last_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for name in ("runs/embedded", "runs/embedded-2", "runs/embedded-3"):
        found.append((str(demo._default_folder(False)), str(demo._default_folder(True))))
        assert found[-1][0] == name
        Path(name).mkdir(parents=True)
    assert [resumed for _, resumed in found] == ["runs/embedded", "runs/embedded", "runs/embedded-2"]


# The small model that is made here.


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    fakes = faked(monkeypatch, demo, "_write", "_train_base", "train", "world_size", "barrier", "is_main")
    fakes.world_size.return_value, fakes.is_main.return_value = RANKS, True
    fakes._write.return_value = paths_in(tmp_path / "written")
    fakes.train.side_effect = lambda settings, compared_to: (f"run {fakes.train.call_count}", "folder")
    monkeypatch.setattr(demo, "EmbeddedRecipe", lambda: RECIPE)
    return fakes


def of_stream(folder: Path) -> dict[str, Any]:
    """The recipe as flags of the stream; a recipe's field that is in none of them belongs to the data or the base."""
    return {
        "model_name_or_path": folder / "base",
        "task_dir": folder / "written" / "tasks",
        "tasks": "first,second",
        "general_file": folder / "written" / "general.jsonl",
        "max_prompt_len": RECIPE.max_prompt_length,
        "max_ans_len": RECIPE.max_answer_length,
        "max_new_tokens": RECIPE.max_new_tokens,
        "mask_ratio": RECIPE.mask_ratio,
        "importance_batch_size": RECIPE.importance_batch_size,
        "max_steps": RECIPE.task_steps,
        "per_device_train_batch_size": RECIPE.task_batch_size // RANKS,
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "linear",
        "adam_beta2": RECIPE.adam_beta2,
    }


@pytest.mark.parametrize("flags", [[], ["--model_name_or_path", demo.EMBEDDED]])
def test_the_recipe_reaches_both_runs_each_with_its_method_rate_and_folder(
    flags: list[str], tmp_path: Path, small: mock.Mock
) -> None:
    settings = parse([*flags, "--method", "piece-f", "--seed", "9"])
    assert demo._run_small(settings, RunFolder(tmp_path), 5) == ["run 1", "run 2"]
    small._write.assert_called_once_with(tmp_path / "material", 5, RECIPE)
    small._train_base.assert_called_once_with(tmp_path / "base", small._write.return_value, RECIPE, settings)
    for call, own in zip(
        small.train.mock_calls,
        (
            {"method": "piece-f", "learning_rate": RECIPE.mask_learning_rate, "output_dir": tmp_path},
            {"method": "seqft", "learning_rate": RECIPE.full_learning_rate, "output_dir": tmp_path / "seqft"},
        ),
        strict=True,
    ):
        expected = texts({**of_stream(tmp_path), **own, "seed": 9})
        assert said(call.args[0], expected) == expected
        # The base model is judged by the first of them alone.
        assert call.kwargs == {"compared_to": None if own["output_dir"] == tmp_path else RunFolder(tmp_path)}


def test_the_users_flags_win_over_the_recipe_and_lose_to_what_makes_the_other_run_another(
    tmp_path: Path, small: mock.Mock
) -> None:
    own = {"learning_rate": "0.25", "output_dir": str(tmp_path), "mask_ratio": "0.75", "max_steps": "3"}
    settings = parse([word for name, value in own.items() for word in (f"--{name}", value)])
    demo._run_small(settings, RunFolder(tmp_path), 5)
    first, second = (call.args[0] for call in small.train.mock_calls)
    assert said(first, own) == own
    rate, folder = str(RECIPE.full_learning_rate), str(tmp_path / "seqft")
    assert said(second, own) == {
        "learning_rate": rate,
        "output_dir": folder,
        "mask_ratio": str(RECIPE.mask_ratio),  # of the method that the user did not change
        "max_steps": "3",
    }


@pytest.mark.parametrize("name", ["mask", "full"])
def test_a_recipe_is_compared_with_plain_fine_tuning(name: str, tmp_path: Path, small: mock.Mock) -> None:
    demo._run_small(parse(["--recipe", name]), RunFolder(tmp_path), 5)
    first, second = (call.args[0] for call in small.train.mock_calls)
    of_method = ("recipe", "method", "step_scale", "general_kl", "general_text")
    assert said(first, of_method) == said(parse(["--recipe", name]), of_method)
    assert said(second, of_method) == said(parse(["--method", "seqft"]), of_method)
    assert said(second, ["learning_rate"]) == {"learning_rate": str(RECIPE.full_learning_rate)}


def test_full_fine_tuning_alone_has_nothing_to_compare(tmp_path: Path, small: mock.Mock) -> None:
    assert demo._run_small(parse(["--method", "seqft"]), RunFolder(tmp_path), 5) == ["run 1"]
    (call,) = small.train.mock_calls
    assert said(call.args[0], ["method", "output_dir"]) == {"method": "seqft", "output_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("flags", "main", "is_run", "trained"),
    [
        ([], True, True, False),
        (["--overwrite_output_dir"], True, True, True),
        (["--overwrite_output_dir"], False, True, False),  # rank 0 clears it
        (["--overwrite_output_dir"], True, False, False),  # only the folder of a run is ours to clear
    ],
)
def test_a_finished_base_is_kept_unless_its_run_is_overwritten(
    flags: list[str], main: bool, is_run: bool, trained: bool, tmp_path: Path, small: mock.Mock
) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    if is_run:
        folder.run_file.write_text("{}")
    small.is_main.return_value = main
    demo._run_small(parse(flags), folder, 5)
    assert bool(small._train_base.mock_calls) == trained
    assert (tmp_path / "base" / "config.json").exists() != trained
    assert [call[0] for call in small.mock_calls][:3].count("barrier") == 1
    if trained:  # the base is gone now; a run that ended before it had one is overwritten too
        demo._run_small(parse(flags), folder, 5)


@pytest.mark.parametrize("main", [False, True])
def test_one_rank_writes_the_material(main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, demo, "write_embedded", "is_main", "broadcast_object")
    fakes.is_main.return_value, fakes.broadcast_object.return_value = main, paths_in(tmp_path)
    assert demo._write(tmp_path, 5, RECIPE) == paths_in(tmp_path)
    assert fakes.write_embedded.mock_calls == [mock.call(tmp_path, 5, RECIPE)] * main
    fakes.broadcast_object.assert_called_once_with(fakes.write_embedded.return_value if main else None)


def test_the_base_is_trained_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("world_size", "Encoder", "tokenize_rows", "load_rows", "load_model", "make_collator", "TaskTrainer")
    fakes = faked(monkeypatch, demo, *names, "release", "barrier")
    fakes.world_size.return_value = RANKS
    from_pretrained = mock.create_autospec(demo.AutoTokenizer.from_pretrained)
    monkeypatch.setattr(demo, "AutoTokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    paths, base = paths_in(tmp_path), tmp_path / "base"
    given = {"seed": 9, "learning_rate": 0.5, "output_dir": "mine", "max_steps": 3, "report_to": "wandb"}
    given |= {"attn_implementation": "eager", "loss_chunk_tokens": 64}
    settings = parse([word for name, value in given.items() for word in (f"--{name}", str(value))])
    demo._train_base(base, paths, RECIPE, settings)

    # The rows.
    tokenizer, file = from_pretrained.return_value, str(paths.base_train_file)
    from_pretrained.assert_called_once_with(paths.model_dir)
    fakes.Encoder.assert_called_once_with(tokenizer, RECIPE.max_prompt_length + RECIPE.max_answer_length)
    fakes.load_rows.assert_called_once_with(file)
    fakes.tokenize_rows.assert_called_once_with(fakes.load_rows.return_value, fakes.Encoder.return_value, file)

    # The untrained model, whatever the user says of another.
    untrained = type(settings.model)(model_name_or_path=str(paths.model_dir))
    fakes.load_model.assert_called_once_with(untrained, torch.float32)

    # The trainer.
    fakes.make_collator.assert_called_once_with(tokenizer)
    arguments = fakes.TaskTrainer.call_args.kwargs["args"]
    fakes.TaskTrainer.assert_called_once_with(
        model=fakes.load_model.return_value,
        args=arguments,
        train_dataset=fakes.tokenize_rows.return_value,
        data_collator=fakes.make_collator.return_value,
        processing_class=tokenizer,
    )
    expected = {
        "output_dir": str(base),
        "max_steps": RECIPE.base_steps,
        "per_device_train_batch_size": RECIPE.base_batch_size // RANKS,
        "learning_rate": RECIPE.base_learning_rate,
        "warmup_steps": RECIPE.base_warmup_steps,
        "lr_scheduler_type": "cosine",
        "adam_beta2": RECIPE.adam_beta2,
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": [],
        "seed": 9,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected

    # It is trained, saved and let go.
    trainer = fakes.TaskTrainer.return_value
    assert trainer.mock_calls == [mock.call.train(), mock.call.save_model(str(base))]
    fakes.release.assert_called_once_with(trainer)
    fakes.barrier.assert_called_once_with()


def test_every_field_of_the_small_recipe_is_used_by_run_or_material() -> None:
    """So that a new field is added to the tables above."""
    of_data = {"num_base_rows", "text_share", "text_bytes", "num_general_rows"}
    of_data |= {"num_train_rows", "num_eval_rows", "num_test_rows"}
    of_base = {"base_steps", "base_batch_size", "base_learning_rate", "base_warmup_steps"}
    of_runs = {"task_steps", "task_batch_size", "mask_ratio", "mask_learning_rate", "full_learning_rate"}
    of_runs |= {"importance_batch_size", "max_prompt_length", "max_answer_length", "max_new_tokens", "adam_beta2"}
    assert {field.name for field in fields(EmbeddedRecipe)} == of_data | of_base | of_runs


# The real model and its office tasks.


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    fakes = faked(monkeypatch, office_demo, "_write", "train", "world_size", "bf16_is_slow", "_recipe_here")
    fakes.world_size.return_value, fakes.bf16_is_slow.return_value = RANKS, False
    fakes._write.return_value = OfficePaths(tmp_path / "written" / "tasks", tmp_path / "written" / "general.jsonl")
    matrix: Any = object()
    fakes.train.side_effect = lambda settings, compared_to=None: (
        RunResults(f"run {fakes.train.call_count}", settings.method.method, 0.5, matrix),
        "folder",
    )
    return fakes


def of_office(folder: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": "some-model",
        "task_dir": folder / "written" / "tasks",
        "tasks": "orders,queries",
        "scorers": "orders=exact,queries=exact",
        "general_file": folder / "written" / "general.jsonl",
        "max_steps": OFFICE.task_steps,
        "per_device_train_batch_size": OFFICE.task_batch_size // RANKS,
        "per_device_eval_batch_size": 16,
        "importance_batch_size": OFFICE.importance_batch_size,
        "max_new_tokens_text": OFFICE.max_new_tokens,
        "lr_scheduler_type": "linear",
        "adam_beta2": OFFICE.adam_beta2,
        "save_model": "never",
        "logging_steps": 4,
    }


def of_contenders(folder: Path) -> dict[str, dict[str, Any]]:
    """Contender -> what it alone is given, by its place in the comparison; None where it has the default."""
    mask = {
        "method": "piece-ratio",
        "mask_ratio": OFFICE.mask_ratio,
        "learning_rate": OFFICE.mask_learning_rate,
        "importance_rows": OFFICE.importance_rows,
        "step_scale": "general",
        "general_text": "self",
        "general_statistics": folder / "material" / "general_statistics",
    }
    kl = {"general_text": "self", "general_kl": OFFICE.general_kl, "general_share": OFFICE.general_share}
    seqft = {"method": "seqft", "learning_rate": OFFICE.full_learning_rate}
    lora = {"method": "lora", "learning_rate": OFFICE.lora_learning_rate}
    return {
        "recommended": {**mask, **kl, "output_dir": folder},
        "recommended without KL": {**mask, "output_dir": folder / "without-kl"},
        "seqft": {**seqft, "output_dir": folder / "seqft"},
        "seqft + KL": {**seqft, **kl, "output_dir": folder / "seqft-kl"},
        "lora": {**lora, "output_dir": folder / "lora"},
        "lora + KL": {**lora, **kl, "output_dir": folder / "lora-kl"},
    }


@pytest.mark.parametrize("leaves_out", [(), ("seqft + KL",)])
@pytest.mark.parametrize("slow", [False, True])
def test_every_contender_gets_the_recipe_and_its_own_flags(
    slow: bool, leaves_out: tuple[str, ...], tmp_path: Path, office: mock.Mock
) -> None:
    recipe = replace(OFFICE, leaves_out=leaves_out)
    office.bf16_is_slow.return_value = slow
    settings = parse(["--seed", "9"])
    comparison = office_demo.run_office(settings, "some-model", RunFolder(tmp_path), recipe)
    office._write.assert_called_once_with(tmp_path / "material", 9, "some-model", recipe)
    assert not office._recipe_here.mock_calls
    contenders = {name: own for name, own in of_contenders(tmp_path).items() if name not in leaves_out}
    every = {name: None for own in contenders.values() for name in own}
    untouched = said(parse([]), every)
    for call, own in zip(office.train.mock_calls, contenders.values(), strict=True):
        expected = {**untouched, **texts({**of_office(tmp_path), **own, "dtype": "float32" if slow else "auto"})}
        assert said(call.args[0], expected) == expected
        # The base model is judged by the first of them alone.
        assert call.kwargs == ({} if own["output_dir"] == tmp_path else {"compared_to": RunFolder(tmp_path)})
    assert [run.name for run in comparison.runs] == list(contenders)
    assert [run.method for run in comparison.runs] == [own["method"] for own in contenders.values()]
    assert comparison.folders == [own["output_dir"] for own in contenders.values()]
    assert comparison.tasks == OFFICE.tasks


def test_only_the_first_contender_takes_the_users_own_flags_in_place_of_its_own(
    tmp_path: Path, office: mock.Mock
) -> None:
    own = {"learning_rate": "0.25", "max_steps": "3", "general_kl": "0.75", "mask_ratio": "0.125"}
    settings = parse([word for name, value in own.items() for word in (f"--{name}", value)])
    comparison = office_demo.run_office(settings, "some-model", RunFolder(tmp_path), OFFICE)
    first, without, seqft, *_ = (said(call.args[0], own) for call in office.train.mock_calls)
    assert first == own
    assert [run.name for run in comparison.runs][:3] == ["recommended, changed", "recommended without KL", "seqft"]
    assert without == {
        "max_steps": "3",
        "general_kl": "0.0",
        "mask_ratio": str(OFFICE.mask_ratio),
        "learning_rate": str(OFFICE.mask_learning_rate),
    }
    untouched = said(parse([]), ["general_kl", "mask_ratio"])
    assert seqft == {"max_steps": "3", "learning_rate": str(OFFICE.full_learning_rate), **untouched}


@pytest.mark.parametrize("name", ["mask", "full", "paper"])
def test_a_recipe_runs_as_it_is_beside_plain_fine_tuning(name: str, tmp_path: Path, office: mock.Mock) -> None:
    settings = parse(["--recipe", name])
    comparison = office_demo.run_office(settings, "some-model", RunFolder(tmp_path), OFFICE)
    assert [run.name for run in comparison.runs] == [f"recipe {name}", "seqft"]
    first, second = (call.args[0] for call in office.train.mock_calls)
    of_method = OF_METHOD - {"importance_batch_size", "general_statistics"}
    assert said(first, of_method) == said(settings, of_method)
    assert first.recipe_rate == settings.recipe_rate  # goes by the size of the model's weights
    plain = parse(["--method", "seqft", "--learning_rate", str(OFFICE.full_learning_rate)])
    assert said(second, of_method) == said(plain, of_method)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("piece-ratio", ["recommended", "seqft"]),
        ("lora", ["lora", "seqft"]),
        ("seqft", ["seqft"]),
        ("piece-f", [{"learning_rate": OFFICE.full_learning_rate}, "seqft"]),
    ],
)
def test_a_method_of_the_users_runs_with_its_known_flags_beside_seqft(
    method: str, expected: list[Any], tmp_path: Path
) -> None:
    known = office_demo.contenders(OFFICE, tmp_path)
    flags = {contender.name: contender.flags for contender in known}
    chosen = office_demo._chosen(parse(["--method", method]), known, OFFICE)
    own = expected[0] if isinstance(expected[0], dict) else flags[expected[0]]
    assert chosen[0] == Contender(method, "", own)
    assert chosen[1:] == [contender for contender in known if contender.name in expected[1:]]
    assert office_demo._chosen(parse([]), known, OFFICE) is known


@pytest.mark.parametrize(
    ("slow", "device", "recipe"),
    [(True, "cpu", SLOW_CPU_RECIPE), (False, "cpu", CPU_RECIPE), (False, "cuda", OfficeRecipe())],
)
def test_the_recipe_is_that_of_the_machine(
    slow: bool, device: str, recipe: OfficeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, office_demo, "bf16_is_slow", "get_accelerator", "_write", "_chosen")
    fakes.bf16_is_slow.return_value, fakes._chosen.return_value = slow, []
    fakes._write.return_value = OfficePaths(tmp_path, tmp_path)
    fakes.get_accelerator.return_value = SimpleNamespace(device_name=lambda: device)
    assert office_demo.run_office(parse([]), "m", RunFolder(tmp_path)).tasks == recipe.tasks
    assert fakes._write.call_args.args[3] == recipe
    assert fakes._chosen.call_args.args[2] == recipe


@pytest.mark.parametrize("main", [False, True])
def test_one_rank_writes_the_office(main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, office_demo, "write_office", "model_source", "is_main", "broadcast_object")
    from_pretrained = mock.create_autospec(office_demo.AutoTokenizer.from_pretrained)
    monkeypatch.setattr(office_demo, "AutoTokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    paths = fakes.broadcast_object.return_value = OfficePaths(tmp_path, tmp_path)
    fakes.is_main.return_value = main
    assert office_demo._write(tmp_path, 5, "some-model", OFFICE) is paths
    tokenizer = from_pretrained.return_value
    assert fakes.model_source.mock_calls == [mock.call("some-model")] * main
    assert from_pretrained.mock_calls == [mock.call(fakes.model_source.return_value)] * main
    assert fakes.write_office.mock_calls == [mock.call(tmp_path, 5, tokenizer, OFFICE)] * main
    fakes.broadcast_object.assert_called_once_with(fakes.write_office.return_value if main else None)


def test_more_ranks_than_rows_of_a_step_have_one_row_each(tmp_path: Path, small: mock.Mock, office: mock.Mock) -> None:
    small.world_size.return_value = office.world_size.return_value = 10_000
    demo._run_small(parse([]), RunFolder(tmp_path), 5)
    office_demo.run_office(parse([]), "some-model", RunFolder(tmp_path), OFFICE)
    for call in (*small.train.mock_calls, *office.train.mock_calls):
        assert call.args[0].flag("per_device_train_batch_size") == "1"


# What the comparison shows.


def run_of(name: str, before: float, after: float, kl: float | None, score: tuple[float, float]) -> RunResults:
    """Two tasks of which the first is forgotten in part; the general loss goes from before to after."""
    matrix = ResultMatrix(("orders", "queries"), ("accuracy", "accuracy"))
    matrix = matrix.with_before({"orders": 0.0, "queries": 0.0}, {"orders": 3.0, "queries": 4.0}, before)
    matrix = matrix.with_row({"orders": score[0]}, {"orders": 1.0}, before + 7.0)
    matrix = matrix.with_row({"orders": score[1], "queries": score[0]}, {"orders": 1.5, "queries": 2.0}, after)
    divergence = {"after queries": {} if kl is None else {"general text": kl}}
    return RunResults(name, "piece-s", 0.5, matrix, divergence=divergence)


def compared(folder: Path) -> Comparison:
    runs = [run_of("recommended", 3.0, 3.0125, 0.004, (0.75, 0.5)), run_of("seqft", 3.0, 2.875, None, (1.0, 0.25))]
    folders = [folder, folder / "seqft"]
    for number, size in enumerate((100_000, 300_000)):
        delta = folder / f"0{number}-{OFFICE.tasks[number]}" / "delta.safetensors"
        delta.parent.mkdir(parents=True)
        delta.write_bytes(bytes(size))
    return Comparison(runs, folders, OFFICE.tasks)


def test_the_table_says_what_was_learned_kept_and_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, office_demo, "_packed_bytes")
    fakes._packed_bytes.side_effect = lambda path: path.stat().st_size // 4
    grid = office_demo.frontier_grid(compared(tmp_path))
    table = [dict(zip(grid.header, row, strict=True)) for row in grid.rows]
    assert table == [
        {
            "run": "recommended",
            "learned": "75.0 %",
            "kept to the end": "62.5 %",
            "general loss": "+0.013",
            "general KL": "0.004",
            "delta of a task": "0.2 MB",
            "packed": "0.1 MB",
        },
        {
            "run": "seqft",
            "learned": "100.0 %",
            "kept to the end": "62.5 %",
            "general loss": "-0.125",
            "general KL": "-",
            "delta of a task": "-",
            "packed": "-",
        },
    ]


def test_a_delta_is_packed_in_its_smallest_coding_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, office_demo, "open_delta", "compose")
    written: list[Path] = []

    def write(deltas: Any, output: Path, with_previous: bool = True, coding: str = "plain") -> None:
        assert (deltas, with_previous, coding) == ([fakes.open_delta.return_value], True, "smallest")
        output.write_bytes(bytes(77))
        written.append(output)

    fakes.compose.side_effect = write
    assert office_demo._packed_bytes(tmp_path / "delta.safetensors") == 77
    fakes.open_delta.assert_called_once_with(tmp_path / "delta.safetensors")
    assert not written[0].parent.exists()


@pytest.mark.parametrize("main", [False, True])
def test_the_comparison_is_shown_by_one_rank(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("is_main", "frontier_grid", "print_grids", "_frontier_picture", "answers_before_and_after")
    fakes, comparison = faked(monkeypatch, office_demo, *names), compared(tmp_path)
    fakes.is_main.return_value, fakes._frontier_picture.return_value = main, b"a picture"
    fakes.answers_before_and_after.return_value = ["what it said", "what it says"]
    picture = tmp_path / "figures" / "frontier.png"
    picture.parent.mkdir()
    office_demo.print_comparison(comparison)
    shown = capsys.readouterr().out
    if not main:
        assert (shown, [path.name for path in picture.parent.iterdir()]) == ("", [])
        assert [call[0] for call in fakes.mock_calls] == ["is_main"]
        return
    assert picture.read_bytes() == b"a picture"
    assert shown == f"figure: {picture}\n\nwhat it said\nwhat it says\n"
    fakes.print_grids.assert_called_once_with([fakes.frontier_grid.return_value])
    fakes.frontier_grid.assert_called_once_with(comparison)
    fakes._frontier_picture.assert_called_once_with(comparison)
    fakes.answers_before_and_after.assert_called_once_with("recommended", RunFolder(tmp_path), OFFICE.tasks)


def test_the_picture_has_a_point_of_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from piece_ds.report import frontier

    fakes = faked(monkeypatch, frontier, "frontier_figure")
    assert office_demo._frontier_picture(compared(tmp_path)) is fakes.frontier_figure.return_value
    ((points, *labels), more) = fakes.frontier_figure.call_args
    assert [(point.method, point.learned, [round(kept, 9) for kept in point.kept]) for point in points] == [
        ("recommended", 0.75, [0.0125]),
        ("seqft", 1.0, [-0.125]),
    ]
    assert labels == ["learned", ["change of general loss (nats)"]]
    assert more == {"y_are_losses": [True]}


def test_the_first_row_of_each_task_is_shown_before_and_after(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for moment, said_then in (("before", "I am not\nsure " * 20), ("01-queries", "SELECT 1")):
        for task in OFFICE.tasks:
            path = folder.predictions(moment) / f"{task}.jsonl"
            write_predictions(path, [f"{task}?\nnow:", "another?"], ["gold", "other"], [said_then, "of another"])
    lines = office_demo.answers_before_and_after("recommended", folder, OFFICE.tasks)
    long = ("I am not sure " * 20)[: office_demo.SHOWN_CHARACTERS] + " ..."
    expected = ["What the model answers, before the stream and after all of it (recommended):"]
    for task in OFFICE.tasks:
        expected += ["", f"  {task}?\n  now:", f"    before  {long}", "    after   SELECT 1", "    right   gold"]
    assert lines == expected


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_is_cut_only_where_it_is_longer_than_a_line(more: int) -> None:
    text = "x" * (office_demo.SHOWN_CHARACTERS + more)
    assert office_demo._shown(f" {text}\n") == (f"{text[:-1]} ..." if more else text)
