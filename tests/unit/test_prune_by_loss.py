"""delta prune --by loss: its numbers add up to what the loss does, and it keeps what lowers the loss."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.deltas import random_mask
from support.launches import make_model_folder, make_rows, write_rows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from piece_ds.__main__ import main
from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.deltas import apply_delta_, open_delta
from piece_ds.deltas.delta import Change
from piece_ds.deltas.loss_effect import loss_effects
from piece_ds.zero.weights import read_selected


class Made:
    """A base, a task that a few steps of gradient descent and some noise have made, and its rows."""

    def __init__(self, root: Path) -> None:
        self.base = make_model_folder(root / "base")
        self.file = write_rows(root / "rows.json", make_rows(3, 24, ("yes", "no")))
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        ids = tokenizer([f"{n}=no" for n in range(8)], return_tensors="pt")["input_ids"]
        self.batches = [{"input_ids": part, "labels": part} for part in ids.split((3, 5))]
        model = AutoModelForCausalLM.from_pretrained(self.base)
        mask = random_mask(model, 0, 0.1, lambda name: "proj" in name or "norm" in name)
        previous = read_selected(model, mask)
        for batch in self.batches:
            model(**batch).loss.backward()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name in mask.index:
                    flat, grad = param.view(-1), param.grad.view(-1)[mask.index[name]]
                    flat[mask.index[name]] -= 0.02 * grad + 0.002 * torch.randn(grad.shape, generator=generator)
        self.delta = root / "task.safetensors"
        save_delta(self.delta, model, mask, previous)

    def loss(self, model: torch.nn.Module) -> float:
        with torch.no_grad():
            sums = [
                (float(model(**b).loss) * b["labels"][:, 1:].numel(), b["labels"][:, 1:].numel()) for b in self.batches
            ]
        return sum(loss for loss, _ in sums) / sum(count for _, count in sums)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("loss"))


def test_the_effects_of_all_changes_add_up_to_the_move_of_the_loss(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.base).eval()
    before = copy.deepcopy(model.state_dict())
    effects = loss_effects(model, open_delta(made.delta), made.batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    at_base = made.loss(model)
    live = apply_delta_(model, made.delta)
    lowered = at_base - made.loss(model)
    total = float(sum(effect.sum() for effect in effects.values()))
    assert lowered > 0.01
    assert total == pytest.approx(lowered, rel=0.02)
    # And one parameter's alone, which is a smaller move.
    live.set_(0.0)
    name, change, held = live.held[3]
    held.write_((change.values + change.previous) / 2 + (change.values - change.previous) / 2)
    assert float(effects[name].sum()) == pytest.approx(at_base - made.loss(model), rel=0.3, abs=2e-4)


class Quadratic(nn.Module):
    """A model whose loss is the squared distance of its weights from a target: exact at the middle of a change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, labels: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.weight - torch.tensor([1.0, 1.0, 1.0, 2.0])).square().sum())


def test_an_effect_is_what_the_change_alone_does_to_a_quadratic_loss() -> None:
    """The gradient in the middle of the change says it exactly, and too far a change raises the loss."""
    change = Change(torch.tensor([0, 1, 3]), torch.tensor([1.0, 3.0, 1.0]), torch.zeros(3))
    delta = SimpleNamespace(shapes={"weight": (4,)}, changes=lambda: [("weight", change)])
    labels = torch.tensor([[-100, 5, 6]])
    effects = loss_effects(Quadratic(), delta, [{"labels": labels}] * 2)  # type: ignore[arg-type]
    assert effects["weight"].tolist() == [1.0, -3.0, 3.0]


def test_what_is_kept_lowers_the_loss_more_than_the_largest_changes_do(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for by in ("loss", "change"):
        words = ["prune", str(made.delta), "--keep", "0.3", "--by", by, "--output", str(tmp_path / by)]
        more = ["--model", str(made.base), "--train_file", str(made.file), "--batch_size", "5"] if by == "loss" else []
        main(["delta", *words, *more])
        said[by] = capsys.readouterr().out
    found = dict(part.rsplit(" ", 1) for part in said["loss"].splitlines()[0].split(": ")[1].split(", "))
    assert float(found["pruned"]) < float(found["base"])
    assert float(found["pruned"]) < float(found["whole delta"])  # what raised the loss was left out
    sizes = {by: open_delta(tmp_path / by).num_selected for by in said}
    assert sizes["loss"] == sizes["change"] == int(0.3 * open_delta(made.delta).num_selected)


def test_flags_that_do_not_belong_together_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["delta", "prune", str(made.delta), "--output", str(tmp_path / "out"), "--keep"]
    model, rows = ["--model", str(made.base)], ["--train_file", str(made.file)]
    for more, message in (
        (["0.5", "--by", "loss", *rows], "needs --model"),
        (["0.5", "--by", "loss", *model], "needs --train_file"),
        (["2", "--by", "loss", *model, *rows], "keep is 2.0"),
        (["0.5", "--by", "loss", "--rows", "0", *model, *rows], "must be positive"),
        (["0.5", "--by", "loss", *model, "--train_file", "nothing.json"], "nothing.json"),
        (["0.5", *model], "--model belongs to --by loss"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
