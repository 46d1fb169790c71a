"""What defines each method without a mask: EWC's gradient, GEM's angle, LwF's target, replay's mix, LoRA's merge."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from support.models import make_micro_batches, make_model
from support.selection_cases import make_stats
from torch import nn

from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.data.tasks import Task
from piece_ds.methods import ewc, lora
from piece_ds.methods.baseline import TaskContext
from piece_ds.methods.ewc import penalty_gradient
from piece_ds.methods.gem import dual_weights
from piece_ds.methods.lora import merged, orthogonality_gradient
from piece_ds.methods.lwf import distillation
from piece_ds.methods.registry import METHODS
from piece_ds.methods.replay import kept_rows
from piece_ds.models.loading import freeze_ineligible
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


def make_task(name: str, num_rows: int, first: int) -> Task:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[1, first + i] for i in range(num_rows)], "labels": [[-100, first + i] for i in range(num_rows)]}
    )
    return Task(name, rows, rows, rows, [], [])


TASKS = (make_task("a", 40, 100), make_task("b", 30, 200), make_task("c", 20, 300))


def context(index: int, folder: Path = Path()) -> TaskContext:
    return TaskContext(index, 3, TASKS[index], TASKS[:index], folder, None, lambda rows: {}, 4, seed=7)


def ids(rows: object) -> list[int]:
    return [row["input_ids"][1] for row in rows]  # type: ignore[attr-defined]


def test_kept_rows_are_a_share_drawn_by_seed_and_task() -> None:
    kept = ids(kept_rows(TASKS[0], 0.25, seed=1))
    assert len(kept) == len(set(kept)) == 10
    assert kept == ids(kept_rows(TASKS[0], 0.25, seed=1)) == sorted(kept)
    assert kept != ids(kept_rows(TASKS[0], 0.25, seed=2))
    assert kept != list(range(100, 110))
    assert len(kept_rows(TASKS[2], 0.001, seed=1)) == 1


@pytest.mark.parametrize("method", ["replay", "replay-online"])
def test_replay_adds_the_share_of_every_earlier_task(method: str) -> None:
    baseline = METHODS[method].baseline(BaselineArguments(memory_ratio=0.1))
    rows = ids(baseline.rows(context(2)))
    assert rows[:20] == ids(TASKS[2].train)
    assert sum(100 <= row < 200 for row in rows) == 4
    assert sum(200 <= row < 300 for row in rows) == 3
    assert baseline.num_rows(TASKS[2], TASKS[:2]) == len(rows) == 27
    assert ids(baseline.rows(context(0))) == ids(TASKS[0].train)


def test_an_epoch_of_replay_is_new_rows_then_kept_ones_each_once() -> None:
    order = METHODS["replay"].baseline(BaselineArguments()).epoch(context(2))
    assert order is not None
    first, second = (order(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert sorted(first[:20]) == list(range(20))
    assert sorted(first[20:]) == list(range(20, 27))
    assert first != second
    assert first[:20] != list(range(20))
    assert METHODS["replay"].baseline(BaselineArguments()).epoch(context(0)) is None
    assert METHODS["replay-online"].baseline(BaselineArguments()).epoch(context(2)) is None


def test_ewcs_gradient_is_that_of_the_quadratic_penalty() -> None:
    weight, anchor, fisher = torch.randn(3, 11)
    weight.requires_grad_()
    (400.0 / 2 * fisher.abs() * (weight - anchor) ** 2).sum().backward()
    found = penalty_gradient(400.0, {"w": (0, fisher.abs())}, {"w": (0, weight.detach())}, {"w": (0, anchor)})
    torch.testing.assert_close(found["w"][1], weight.grad)


def test_ewc_keeps_the_earlier_tasks_fisher_decayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F = decay * F of earlier tasks + the mean squared gradient of this one."""
    earlier, now = make_stats("random"), make_stats("bf16-tied")
    now.num_micro_batches = 4
    baseline = METHODS["ewc"].baseline(BaselineArguments(ewc_decay=0.25))
    save_statistics(tmp_path / "before" / ewc.FOLDER, replace(earlier, grad_sum=None))
    monkeypatch.setattr(ewc, "layout_of", lambda module: earlier.layout)

    def collect(engine: Any, batches: Any, needs_sum: bool, *, layout: Layout) -> GradientStats:
        assert not needs_sum  # 4 bytes for each weight
        assert layout is earlier.layout
        return now

    monkeypatch.setattr(ewc, "collect_statistics", collect)
    (tmp_path / "now").mkdir()
    baseline.end_task(SimpleNamespace(module=None), replace(context(1, tmp_path / "now"), previous=tmp_path / "before"))
    kept = load_statistics(tmp_path / "now" / ewc.FOLDER, earlier.layout, False, torch.device("cpu"))
    torch.testing.assert_close(kept.square_sum, 0.25 * earlier.square_sum + now.square_sum / 4)


@pytest.mark.parametrize("num_memories", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_gems_step_is_the_nearest_that_harms_no_memory(num_memories: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    memories, gradient = rng.standard_normal((num_memories, 12)), rng.standard_normal(12)
    weights = dual_weights(memories @ memories.T, memories @ gradient, margin=0.0)
    step = gradient + weights @ memories
    assert (weights >= 0).all()
    assert (memories @ step >= -1e-4).all()
    want = minimize(
        lambda x: ((x - gradient) ** 2).sum(), gradient, constraints={"type": "ineq", "fun": lambda x: memories @ x}
    )
    assert ((step - gradient) ** 2).sum() <= want.fun + 1e-3


def test_gems_margin_turns_further() -> None:
    memory, gradient = np.array([[1.0, 0.0]]), np.array([-1.0, 1.0])
    for margin in (0.0, 0.5):
        weights = dual_weights(memory @ memory.T, memory @ gradient, margin)
        assert float((memory @ (gradient + weights @ memory))[0]) == pytest.approx(0.0, abs=1e-5)
    assert dual_weights(memory @ memory.T, np.array([-0.1]), 0.5)[0] == pytest.approx(0.5)


def test_gem_has_an_answer_for_memories_that_point_the_same_way() -> None:
    memories, gradient = np.ones((3, 4)), -np.ones(4)
    weights = dual_weights(memories @ memories.T, memories @ gradient, 0.0)
    assert (memories @ (gradient + weights @ memories) >= -1e-3).all()


def test_lwfs_loss_is_the_softened_divergence_from_what_was_said_before() -> None:
    student, teacher = torch.randn(2, 5, 9)
    now, before = F.softmax(student / 2, -1), F.softmax(teacher / 2, -1)
    want = 4 * (before * (before / now).log()).sum()
    torch.testing.assert_close(distillation(student, teacher, 2.0), want)
    assert float(distillation(student, student, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_o_loras_gradient_is_that_of_the_l1_products() -> None:
    fixed, newest = torch.randn(6, 8), torch.randn(3, 8, requires_grad=True)
    (0.5 * (fixed @ newest.T).abs().sum()).backward()
    torch.testing.assert_close(orthogonality_gradient(0.5, fixed, newest.detach()), newest.grad)


def adapted(method: str, family: str, num_tasks: int = 3) -> nn.Module:
    model = make_model(family)
    freeze_ineligible(model)
    model = METHODS[method].baseline(BaselineArguments()).adapt(model, num_tasks, None)
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at first
            param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_merged_model_says_what_the_adapted_one_says(family: str) -> None:
    model = adapted("lora", family)
    plain = make_model(family).eval()
    missing, unexpected = plain.load_state_dict(merged(model, model.state_dict()), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # where it is tied
    for batch in itertools.islice(make_micro_batches(), 2):
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_o_lora_trains_the_newest_adapter_alone_and_says_what_all_so_far_say() -> None:
    model = adapted("o-lora", "llama")
    method = METHODS["o-lora"].baseline(BaselineArguments())
    method.begin_task(model, context(1))
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained
    assert all(".task01." in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 7
    plain = make_model("llama").eval()
    plain.load_state_dict(merged(model, model.state_dict()))
    batch = make_micro_batches()[0]
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_o_lora_holds_the_newest_factor_orthogonal_to_every_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third task of three: the gradient of the penalty there."""
    model = adapted("o-lora", "llama")
    method = METHODS["o-lora"].baseline(BaselineArguments(o_lora_lambda=0.5))
    assert method.engine_callback(context(0)) is None
    assert METHODS["o-lora"].baseline(BaselineArguments(o_lora_lambda=0.0)).engine_callback(context(2)) is None
    params = dict(model.named_parameters())
    newest = {name: param for name, param in params.items() if ".lora_A.task02." in name}
    added: dict[str, tuple[int, torch.Tensor]] = {}

    class Term:
        replicated = True

        def __init__(self, engine: object) -> None:
            self.add_ = added.update

        def install(self, add: object) -> object:
            return add

        def weights(self) -> dict[str, tuple[int, torch.Tensor]]:
            return {name: (0, param.detach().reshape(-1)) for name, param in newest.items()}

    monkeypatch.setattr(lora, "GradientTerm", Term)
    callback = method.engine_callback(context(2))
    assert callback is not None
    callback.begin(SimpleNamespace(module=model, device=torch.device("cpu")))
    callback.remove[-1]()
    assert added.keys() == newest.keys()
    penalty = torch.zeros(())
    for name, param in newest.items():
        param.requires_grad_()
        for task in ("task00", "task01"):
            earlier = params[name.replace("task02", task)].detach()
            penalty = penalty + 0.5 * (earlier @ param.T).abs().sum()
    penalty.backward()
    for name, (start, values) in added.items():
        assert start == 0
        torch.testing.assert_close(values, newest[name].grad.reshape(-1))


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(UserError, match="--lora_target_modules nothing"):
        METHODS["lora"].baseline(BaselineArguments(lora_target_modules="nothing")).adapt(make_model("llama"), 1, None)


@pytest.mark.parametrize(
    "bad",
    [{"ewc_lambda": -1.0}, {"ewc_decay": 0.0}, {"memory_ratio": 1.5}, {"lwf_temperature": 0.0}, {"lora_dropout": 1.0}],
)
def test_settings_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        BaselineArguments(**bad)  # type: ignore[arg-type]
