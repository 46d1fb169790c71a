"""The experiment's bookkeeping: what is done is not done again, and a stop leaves a usable picture."""

from pathlib import Path

import pytest

from bench.continual import material
from bench.continual.grid import MAIN, SWEEPS, Setting, settings_in_order
from bench.continual.recipe import BaseRecipe, StreamRecipe, digest
from bench.continual.runs_file import add_run, not_done, read_runs


def row(setting: Setting, recipe: str, **more: str) -> dict[str, str]:
    return {**dict(zip(("method", "ratio", "rate", "seed"), setting.key, strict=True)), "recipe": recipe, **more}


A, B = Setting("random", 0.01, 1e-3, 1), Setting("random", 0.01, 1e-3, 2)


def test_a_run_with_a_row_of_the_same_recipe_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert not_done([A, B], read_runs(path), "one") == [A, B]
    add_run(path, row(A, "one", loss="3.25"))
    assert not_done([A, B], read_runs(path), "one") == [B]
    assert not_done([A, B], read_runs(path), "two") == [A, B]


def test_a_row_replaces_that_of_an_earlier_recipe_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for setting in (A, B):
        add_run(path, row(setting, "one", loss="1"))
    add_run(path, row(A, "two", loss="2", more="3"))
    assert read_runs(path) == [row(B, "one", loss="1", more=""), row(A, "two", loss="2", more="3")]


def test_every_setting_is_there_once_and_the_main_question_comes_first() -> None:
    settings = settings_in_order((1, 2, 3))
    assert len({setting.key for setting in settings}) == len(settings)
    assert len(settings) == 3 * sum(len(sweep.rates) for sweep in SWEEPS)
    num_main = sum(len(sweep.rates) for sweep in MAIN)
    assert {setting.method for setting in settings[:num_main]} == {sweep.method for sweep in MAIN}
    assert {setting.seed for setting in settings[:num_main]} == {1}
    # All seeds of the main question, and one of the rest, come before the other seeds of the rest.
    rest = [setting for setting in settings if setting not in settings_in_order((1,))]
    assert {setting.seed for setting in settings[-len(settings) // 3 :]} <= {2, 3}
    assert [setting.seed for setting in rest[: 2 * num_main]] == [2] * num_main + [3] * num_main


def test_every_method_has_at_least_four_rates_and_masks_have_equal_ratios() -> None:
    first = settings_in_order((1,))
    for name in {(setting.method, setting.ratio) for setting in first}:
        assert len({setting.rate for setting in first if (setting.method, setting.ratio) == name}) >= 4
    ratios = {
        method: {s.ratio for s in first if s.method == method}
        for method in ("piece-s", "piece-f", "random", "magnitude")
    }
    assert len({frozenset(of_method) for of_method in ratios.values()}) == 1


def test_the_recipe_decides_its_hash() -> None:
    assert digest(StreamRecipe()) == digest(StreamRecipe())
    assert digest(StreamRecipe(), "files") != digest(StreamRecipe(), "other files")
    assert digest(StreamRecipe()) != digest(StreamRecipe(steps=17))


def test_no_text_is_both_learned_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text under many names is kept once, so that no held-out file was learned under another name."""
    texts = [(f"file-{index}", f"text {index % 150} " * 100) for index in range(300)]
    monkeypatch.setattr(material, "_KINDS", {"docs": lambda: iter(texts)})
    recipe = BaseRecipe(kind_bytes=(("docs", 10**6),), held_out_share=0.3)
    found = material.collect(recipe)
    assert len(found.learned) + len(found.held_out) == 150
    assert not set(found.learned) & set(found.held_out)
    assert 25 <= len(found.held_out) <= 65
    again = material.collect(recipe)
    assert (again.learned, again.held_out, again.digest) == (found.learned, found.held_out, found.digest)


def test_a_machine_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "_KINDS", {"docs": lambda: iter([("one", "short " * 100)])})
    with pytest.raises(RuntimeError, match="--base"):
        material.collect(BaseRecipe(kind_bytes=(("docs", 10**6),)))
