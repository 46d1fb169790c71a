"""A term is added where a rank's gradient lies, times the loss scale that DeepSpeed will divide by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from piece_ds.zero.adapter import Piece
from piece_ds.zero.gradient_term import GradientTerm


@pytest.mark.parametrize(("is_fp16", "scale"), [(False, 1.0), (True, 64.0)])
def test_a_term_is_scaled_as_the_gradient_is(monkeypatch: pytest.MonkeyPatch, is_fp16: bool, scale: float) -> None:
    """Two parameters in one buffer of a rank: elements 2 to 5 of one and 0 to 2 of the other; a third has no term."""
    grad = torch.arange(9, dtype=torch.float16)
    pieces = [Piece("a", 2, 4, 0), Piece("b", 0, 3, 4), Piece("c", 5, 2, 7)]
    refreshed: list[bool] = []
    adapter = SimpleNamespace(
        replicated=False,
        gradients=lambda: [(grad, pieces)],
        optimizer=SimpleNamespace(loss_scale=scale),
        refresh_norm=lambda: refreshed.append(True),
    )
    monkeypatch.setattr("piece_ds.zero.gradient_term.adapter_for", lambda engine: adapter)
    monkeypatch.setattr("piece_ds.zero.gradient_term.refuse_sequences", lambda engine, what: None)
    zero = SimpleNamespace(offload_optimizer=None)
    engine: Any = SimpleNamespace(
        _config=SimpleNamespace(zero_config=zero), dp_world_size=2, fp16_enabled=lambda: is_fp16
    )
    term = GradientTerm(engine)
    assert not term.replicated
    before = term.gradients()
    assert {name: (start, values.tolist()) for name, (start, values) in before.items()} == {
        "a": (2, [value / scale for value in (0, 1, 2, 3)]),
        "b": (0, [value / scale for value in (4, 5, 6)]),
        "c": (5, [value / scale for value in (7, 8)]),
    }

    # The term covers more of "a" than this rank holds.
    term.add_({"a": (1, torch.tensor([9.0, 0.5, 1.0, 1.5, 2.0, 9.0])), "b": (0, torch.tensor([0.25, 0.0, -0.25]))})
    after = {name: values - before[name][1] for name, (_, values) in term.gradients().items()}
    assert after["a"].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert after["b"].tolist() == [0.25, 0.0, -0.25]
    assert after["c"].tolist() == [0.0, 0.0]
    assert refreshed == [True]
