"""The table of methods decides what each may be used with, and takes estimators of others."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from support.fakes import faked
from support.models import make_model
from torch import Tensor

from piece_ds import register_estimator
from piece_ds.methods import estimate, registry
from piece_ds.methods.method import BASELINE, SELECTION
from piece_ds.methods.registry import METHODS, find_estimator, find_method, methods_help, names_of
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import Estimator, Fragment
from piece_ds.state.statistics import GradientStats, empty_stats


@pytest.fixture(autouse=True)
def _table_as_it_was() -> Iterator[None]:
    before, installed = dict(METHODS), set(registry._installed)
    yield
    METHODS.clear()
    METHODS.update(before)
    registry._installed.clear()
    registry._installed.update(installed)


def mean_gradient(fragment: Fragment) -> Tensor:
    assert fragment.grad_sum is not None
    return fragment.grad_sum.abs()


class Engine:
    """What estimate_mask() sees of an engine when somebody else takes the statistics."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.module = make_model("llama")


def test_every_method_says_what_it_is() -> None:
    assert set(names_of(SELECTION)) | set(names_of(BASELINE)) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.help
        assert method.source
        assert name in methods_help()
    assert [name for name, method in METHODS.items() if method.kind == BASELINE and method.uses_ops] == ["ewc", "gem"]
    assert [name for name, method in METHODS.items() if method.changes_gradient] == ["ewc", "gem", "o-lora"]
    assert {name for name in names_of(BASELINE) if METHODS[name].reads_images} == {"seqft"}


def test_an_estimator_of_the_sum_alone_gets_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was an AssertionError: the pass was not asked to keep the sum."""
    register_estimator("mean-gradient", mean_gradient, needs="sum")
    engine, batches, layout = Engine(), list[Any](), layout_of(make_model("llama"))
    keeper: Any = object()

    def collected(*_: Any, **options: Any) -> GradientStats:
        stats = empty_stats(options["layout"], options["needs_sum"], "cpu")
        assert stats.grad_sum is not None
        stats.grad_sum.copy_(torch.arange(stats.layout.num_owned) % 1009)
        return stats

    collect = faked(monkeypatch, estimate, "collect_statistics").collect_statistics
    collect.side_effect = collected
    settings = {"method": "mean-gradient", "ratio": 0.01, "statistics_device": "cpu"}
    mask = estimate.estimate_mask(engine, batches, layout=layout, keeper=keeper, **settings)
    last_pass = collect.call_args.kwargs["last_pass"]
    collect.assert_called_once_with(
        engine, batches, needs_sum=True, device="cpu", layout=layout, last_pass=last_pass, keeper=keeper
    )
    assert isinstance(last_pass, LastPassFilter)
    assert mask.method == "mean-gradient"
    flat = torch.arange(layout.num_owned) % 1009
    lowest = min(
        int(flat[offset + positions].min())
        for info, _, offset in layout.owned()
        if (positions := mask.index.get(info.name, torch.zeros(0, dtype=torch.int64))).numel()
    )
    assert int((flat > lowest).sum()) <= mask.num_selected <= int((flat >= lowest).sum())


@pytest.mark.parametrize("needs", ["nothing", "squares", "sum", "sum and squares"])
def test_a_registered_estimator_is_a_method_like_any_other(needs: str) -> None:
    register_estimator("mine", lambda fragment: torch.arange(fragment.numel).float(), needs=needs, help="for a test")
    method = find_method("mine")
    assert method.has_mask
    assert method.needs == needs
    assert "mine: for a test" in methods_help()
    stats = None if needs == "nothing" else empty_stats(layout_of(make_model("llama")), True, "cpu")
    mask = estimate.select(layout_of(make_model("llama")), "mine", 0.01, stats)
    assert mask.num_selected == sum(index.numel() for index in mask.index.values())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda fragment: torch.zeros(fragment.numel, dtype=torch.float64), "returned torch.float64"),
        (lambda fragment: torch.zeros(1), r"expected torch.float32 \(\d+,\): one score per element"),
        (lambda fragment: 3.0, "returned float"),
        (lambda fragment: torch.full((fragment.numel,), -1.0), "negative or NaN"),
        (lambda fragment: torch.full((fragment.numel,), float("nan")), "negative or NaN"),
    ],
)
def test_wrong_scores_are_refused_by_name(scores: Any, message: str) -> None:
    register_estimator("mine", scores, needs="nothing")
    with pytest.raises(ValueError, match=f"estimator 'mine' returned.*{message.removeprefix('returned ')}"):
        estimate.select(layout_of(make_model("llama")), "mine", 0.01)


def test_a_taken_name_and_unknown_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="'piece-s' is there already"):
        register_estimator("piece-s", mean_gradient, needs="sum")
    with pytest.raises(ValueError, match="needs is 'gradients', expected one of nothing, squares, sum"):
        register_estimator("mine", mean_gradient, needs="gradients")
    with pytest.raises(UserError, match="'lift' is no importance estimator; known: piece-s"):
        find_estimator("lift")


ESTIMATOR = Estimator("of-a-package", mean_gradient, "sum")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"{__name__}:ESTIMATOR", None),
        (f"{__name__}:mean_gradient", "expected a piece_ds.Estimator, got function"),
        ("no_such_module:x", "no_such_module"),
    ],
)
def test_installed_packages_add_estimators(monkeypatch: pytest.MonkeyPatch, value: str, message: str | None) -> None:
    monkeypatch.setattr(registry, "_entry_points", lambda path: (EntryPoint("x", value, registry.GROUP),))
    if message is not None:
        with pytest.raises(UserError, match=f"entry point x = .* cannot be used: .*{message}"):
            find_method("of-a-package")
        return
    assert find_method("of-a-package").needs == "sum"
    assert find_method("of-a-package").source == value
