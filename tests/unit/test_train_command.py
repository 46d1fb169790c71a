"""`piece_ds train`: what was checked reaches the stream, the Hub and the tables, each in its place."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support.fakes import faked

from piece_ds.cli import run
from piece_ds.cli import train as command
from piece_ds.config.recommended import NOTE
from piece_ds.config.settings import Settings
from piece_ds.preflight.inputs import Inputs
from piece_ds.training.run import Stream
from piece_ds.training.run_folder import RunFolder

# Where each field of a Stream comes from, among the inputs; a new field fails the test until it stands here.
FROM = {
    **{name: name for name in ("settings", "tokenizer", "tasks", "scorers", "general", "dtype", "claim", "reporters")},
    **{name: name for name in ("baseline", "general_importance", "judged")},
    "eval_batch_size": "arguments.per_device_eval_batch_size",
    "seed": "arguments.seed",
}
REAL = ("preflight", "remote_of_run", "deterministic_run", "run_stream", "push_run", "is_main", "printable")


def checked_inputs(folder: Path, **arguments: Any) -> Inputs:
    """Inputs whose every field is another object."""
    values: dict[str, Any] = {field.name: getattr(mock.sentinel, field.name) for field in fields(Inputs)}
    values["settings"] = SimpleNamespace(output=SimpleNamespace(deterministic="as checked"))
    values["claim"] = SimpleNamespace(folder=RunFolder(folder))
    values["arguments"] = SimpleNamespace(
        per_device_eval_batch_size=3, per_device_train_batch_size=5, seed=7, data_seed=8, **arguments
    )
    return Inputs(**values)


def value_at(inputs: Inputs, path: str) -> Any:
    found: Any = inputs
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("other", [None, RunFolder(Path("other"))])
def test_every_field_of_the_stream_is_what_was_checked(
    other: RunFolder | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, run, *REAL)
    given: Any = SimpleNamespace(method=SimpleNamespace(method="piece-f"))
    inputs = fakes.preflight.return_value = checked_inputs(tmp_path)
    fakes.remote_of_run.return_value = None
    fakes.deterministic_run.return_value = mock.MagicMock()
    results, folder = run.train(given, other)
    assert (results, folder.root) == (fakes.run_stream.return_value, tmp_path)
    ((stream,), _) = fakes.run_stream.call_args
    assert {field.name for field in fields(Stream)} == {*FROM, "compared_to"}
    assert stream.compared_to is other
    for name, path in FROM.items():
        assert getattr(stream, name) is value_at(inputs, path), name

    # In this order: nothing is written before the Hub knows the token.
    assert [call[0] for call in fakes.mock_calls if call[0] in REAL] == [
        "preflight",
        "remote_of_run",
        "deterministic_run",
        "run_stream",
    ]
    fakes.preflight.assert_called_once_with(given)
    fakes.remote_of_run.assert_called_once_with(inputs.arguments, "piece-f")
    fakes.deterministic_run.assert_called_once_with("as checked")
    fakes.deterministic_run.return_value.__enter__.assert_called_once_with()


@pytest.mark.parametrize("private", [None, False, True])
@pytest.mark.parametrize("main", [False, True])
def test_one_rank_pushes_the_finished_run(
    main: bool,
    private: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes = faked(monkeypatch, run, *REAL)
    fakes.preflight.return_value = checked_inputs(tmp_path, hub_private_repo=private, hub_always_push=not private)
    fakes.deterministic_run.return_value = mock.MagicMock()
    fakes.is_main.return_value, fakes.printable.return_value = main, "as can be shown"
    run.train(mock.Mock(spec=Settings, method=SimpleNamespace(method="piece-s")))
    shown = capsys.readouterr().out
    if not main:
        assert not fakes.push_run.mock_calls
        assert shown == ""
        return
    fakes.push_run.assert_called_once_with(tmp_path, fakes.remote_of_run.return_value, private=private is True)
    fakes.printable.assert_called_once_with(fakes.push_run.return_value)
    assert shown == "as can be shown\n"


@pytest.mark.parametrize("flags", [[], ["--model_name_or_path", "embedded"]])
@pytest.mark.parametrize("comparison", [None, "comparison"])
def test_without_a_model_the_embedded_default_runs_and_is_shown(
    comparison: Any, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, command, "run_embedded", "show", "print_comparison", "train")
    fakes.run_embedded.return_value = (["runs"], RunFolder(tmp_path), comparison)
    command.main([*flags, "--seed", "9", "--mask_ratio", "0.03"])
    ((settings,), _) = fakes.run_embedded.call_args
    assert (settings.flag("seed"), settings.method.mask_ratio) == ("9", 0.03)
    fakes.show.assert_called_once_with(["runs"], RunFolder(tmp_path))
    assert fakes.print_comparison.mock_calls == ([] if comparison is None else [mock.call(comparison)])
    assert not fakes.train.mock_calls


@pytest.mark.parametrize(
    ("flags", "main", "noted"),
    [
        ([], True, True),
        ([], False, False),
        (["--method", "piece-s"], True, False),
        (["--mask_file", "mask.safetensors"], True, False),
    ],
)
def test_a_model_is_trained_as_the_flags_say_and_the_default_method_is_named_once(
    flags: list[str], main: bool, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fakes = faked(monkeypatch, command, "run_embedded", "show", "train", "is_main")
    fakes.train.return_value, fakes.is_main.return_value = ("results", RunFolder(tmp_path)), main
    command.main(["--model_name_or_path", "m", "--seed", "9", "--mask_ratio", "0.03", *flags])
    ((settings,), _) = fakes.train.call_args
    assert (settings.model.model_name_or_path, settings.flag("seed"), settings.method.mask_ratio) == ("m", "9", 0.03)
    fakes.show.assert_called_once_with(["results"], RunFolder(tmp_path))
    assert not fakes.run_embedded.mock_calls
    assert (NOTE in caplog.messages) == noted


@pytest.mark.parametrize("main", [False, True])
def test_one_rank_shows_tables_and_report(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = faked(monkeypatch, command, "is_main", "print_results", "write_report")
    fakes.is_main.return_value, fakes.write_report.return_value = main, tmp_path / "report.html"
    runs: list[Any] = ["first", "second"]
    command.show(runs, RunFolder(tmp_path))
    assert fakes.print_results.mock_calls == [mock.call(runs)] * main
    assert fakes.write_report.mock_calls == [mock.call(tmp_path, runs)] * main
    assert capsys.readouterr().out == (f"report: {tmp_path / 'report.html'}\n" if main else "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_says_the_methods_and_trains_nothing(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = faked(monkeypatch, command, "run_embedded", "train", "methods_help")
    fakes.methods_help.return_value = "words-of-every-method"
    command.main(["--model_name_or_path", "m", flag])
    assert "words-of-every-method" in capsys.readouterr().out
    assert [call[0] for call in fakes.mock_calls] == ["methods_help"]
