"""Deltas scaled, pruned, merged and taken of two models: by hand, by the papers' definitions, and back to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.deltas import Run, make_run, move_selected, random_mask, sha256_of
from torch import nn
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.deltas.delta import Change, open_delta
from piece_ds.deltas.live import apply_delta_
from piece_ds.deltas.scale import scaled_values
from piece_ds.runtime.errors import UserError
from piece_ds.state.weights_hash import bits_of
from piece_ds.zero.weights import read_selected

pytestmark = pytest.mark.heavy

Capture = pytest.CaptureFixture[str]


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), dtype=request.param, sharded=True)


def rows(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(bits_of(first[n]), bits_of(second[n])) for n in first)


def test_scaling_is_previous_plus_alpha_times_the_change_and_any_alpha_comes_back(run: Run, tmp_path: Path) -> None:
    task = rows(run.deltas[0])
    delta("scale", run.deltas[0], "--alpha", 0.3, "--output", tmp_path / "a")
    scaled = rows(tmp_path / "a")
    assert open_delta(tmp_path / "a").scale == 0.3
    for name in open_delta(run.deltas[0]).shapes:
        before, value = task[f"{name}.previous"].double(), task[f"{name}.values"].double()
        assert torch.equal(scaled[f"{name}.values"], (before + 0.3 * (value - before)).to(task[f"{name}.values"].dtype))
    delta("scale", tmp_path / "a", "--alpha", 0.7, "--output", tmp_path / "b")
    delta("scale", run.deltas[0], "--alpha", 0.7, "--output", tmp_path / "c")
    assert same_bits(rows(tmp_path / "b"), rows(tmp_path / "c"))  # from any other alpha
    delta("scale", tmp_path / "b", "--alpha", 1, "--output", tmp_path / "d")
    assert same_bits(rows(tmp_path / "d"), task)
    assert open_delta(tmp_path / "d").metadata == open_delta(run.deltas[0]).metadata | {
        "ratio": open_delta(tmp_path / "d").metadata["ratio"]
    }
    delta("scale", run.deltas[0], "--alpha", 0, "--output", tmp_path / "e")
    zero = rows(tmp_path / "e")
    assert all(torch.equal(zero[n], zero[n.replace(".values", ".previous")]) for n in zero if n.endswith(".values"))
    assert open_delta(tmp_path / "e").result_fingerprint == open_delta(tmp_path / "e").base_fingerprint


@pytest.mark.parametrize("command", ["scale", "prune", "linear", "ties", "dare", "diff", "diff-ratio"])
def test_what_was_computed_is_applied_and_reverted_to_the_bit(run: Run, tmp_path: Path, command: str) -> None:
    out = ["--output", tmp_path / "f.safetensors"]
    if command == "scale":
        delta("scale", run.deltas[0], "--alpha", 0.25, *out)
    elif command == "prune":
        delta("prune", run.deltas[0], "--keep", 0.5, *out)
    elif command.startswith("diff"):
        delta("diff", run.base, run.final, *out, *(["--ratio", 0.01] if command == "diff-ratio" else []))
    else:
        density = [] if command == "linear" else ["--density", 0.5]
        delta("merge", run.base, run.folder, "--how", command, *density, *out)
        delta("merge", run.base, run.folder, "--how", command, *density, "--output", tmp_path / "folder")
    before = sha256_of(run.base)
    delta("apply", run.base, tmp_path / "f.safetensors", "--output", tmp_path / "there")
    there = {name: sha for name, sha in sha256_of(tmp_path / "there").items() if name != "piece_ds.json"}
    assert there != before
    if command in ("linear", "ties", "dare"):
        assert there == sha256_of(tmp_path / "folder")
    if command == "diff":
        assert there == sha256_of(run.final)
    delta("revert", tmp_path / "there", tmp_path / "f.safetensors", "--output", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == before


@pytest.mark.parametrize("by", ["change", "relative"])
def test_pruning_keeps_exactly_the_largest(run: Run, tmp_path: Path, by: str) -> None:
    task, names = rows(run.deltas[0]), list(open_delta(run.deltas[0]).shapes)
    delta("prune", run.deltas[0], "--keep", 0.37, "--by", by, "--output", tmp_path / "p")
    kept = rows(tmp_path / "p")
    scored = []
    for number, name in enumerate(names):
        before, after = task[f"{name}.previous"].double(), task[f"{name}.values"].double()
        size = (after - before).abs() / (before.abs() if by == "relative" else 1.0)
        scored += [
            (-score, number, i) for score, i in zip(size.tolist(), task[f"{name}.indices"].tolist(), strict=True)
        ]
    wanted = sorted(scored)[: int(0.37 * len(scored))]
    found = [
        (number, i) for number, name in enumerate(names) for i in kept.get(f"{name}.indices", torch.zeros(0)).tolist()
    ]
    assert sorted((number, int(i)) for number, i in found) == sorted((number, i) for _, number, i in wanted)


def test_what_was_pruned_of_a_scaled_task_is_scaled_back_to_the_tasks_own_values(run: Run, tmp_path: Path) -> None:
    """Whether a task is scaled or pruned first: the unscaled values are pruned too."""
    delta("scale", run.deltas[0], "--alpha", 0.25, "--output", tmp_path / "scaled")
    delta("prune", tmp_path / "scaled", "--keep", 0.5, "--output", tmp_path / "pruned")
    assert open_delta(tmp_path / "pruned").scale == 0.25
    delta("scale", tmp_path / "pruned", "--alpha", 1, "--output", tmp_path / "back")
    task, back = rows(run.deltas[0]), rows(tmp_path / "back")
    names = open_delta(tmp_path / "back").shapes
    assert names
    for name in names:
        places = torch.searchsorted(task[f"{name}.indices"], back[f"{name}.indices"])
        for part in ("indices", "values", "previous"):
            assert torch.equal(back[f"{name}.{part}"], task[f"{name}.{part}"][places]), (name, part)


def vectors(deltas: list[Path], weights: torch.Tensor) -> torch.Tensor:
    """Each delta's changes as dense vectors over one parameter, fp64."""
    dense = torch.zeros(len(deltas), weights.numel(), dtype=torch.float64)
    for row, file in enumerate(deltas):
        tensors = load_file(file)
        dense[row, tensors["weight.indices"].long()] = (
            tensors["weight.values"].double() - tensors["weight.previous"].double()
        )
    return dense


@pytest.fixture
def siblings(tmp_path: Path) -> tuple[torch.Tensor, list[Path]]:
    """Three tasks trained on one base of 40 weights; their selections overlap, their signs disagree."""
    model = nn.Linear(10, 4, bias=False)
    base = model.weight.detach().clone()
    paths = []
    for task in range(3):
        model.weight.data.copy_(base)
        mask = random_mask(model, task, 0.6, lambda name: True)
        previous = read_selected(model, mask)
        move_selected(model, mask, task)
        paths.append(tmp_path / f"{task}.safetensors")
        save_delta(paths[-1], model, mask, previous)
    return base, paths


def merged(base: torch.Tensor, paths: list[Path], output: Path, **options: object) -> torch.Tensor:
    from piece_ds.deltas.combine import Merge, merge_deltas

    merge_deltas([open_delta(path) for path in paths], Merge(**options), output)  # type: ignore[arg-type]
    tensors = load_file(output)
    result = base.clone().view(-1)
    assert torch.equal(tensors["weight.previous"], result[tensors["weight.indices"].long()])
    result[tensors["weight.indices"].long()] = tensors["weight.values"]
    return result


def test_ties_is_the_papers_algorithm(siblings: tuple[torch.Tensor, list[Path]], tmp_path: Path) -> None:
    """Algorithm 1 of arXiv 2306.01708, element by element in plain Python."""
    base, paths = siblings
    dense = vectors(paths, base)
    for density, scale in ((1.0, 1.0), (0.4, 0.7)):
        trimmed = []
        for tau in dense:
            selected = int((tau != 0).sum())
            order = sorted(range(40), key=lambda i: (-abs(float(tau[i])), i))[: max(1, int(density * selected))]
            trimmed.append([float(tau[i]) if i in order else 0.0 for i in range(40)])
        expected = []
        for i in range(40):
            column = [tau[i] for tau in trimmed]
            gamma = (sum(column) > 0) - (sum(column) < 0)
            agreeing = [value for value in column if value * gamma > 0]
            expected.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
        found = merged(base, paths, tmp_path / "m", how="ties", density=density, scale=scale)
        wanted = (base.view(-1).double() + torch.tensor(expected, dtype=torch.float64)).float()
        assert (found - wanted).abs().max() <= 1e-7 * wanted.abs().max()


def test_linear_and_dare_are_weighted_sums(siblings: tuple[torch.Tensor, list[Path]], tmp_path: Path) -> None:
    base, paths = siblings
    dense = vectors(paths, base)
    found = merged(base, paths, tmp_path / "m", how="linear", weights=(0.5, 0.25, 2.0), scale=0.5)
    wanted = base.view(-1).double() + 0.5 * (torch.tensor([0.5, 0.25, 2.0]).double() @ dense)
    assert torch.equal(found, wanted.float())
    assert torch.equal(
        merged(base, paths, tmp_path / "m", how="linear"), merged(base, paths, tmp_path / "m", how="dare")
    )

    # DARE: of each change either nothing or 1 / density of it, the second as often as density says; unbiased.
    one = [merged(base, paths[:1], tmp_path / "m", how="dare", density=0.5, seed=seed) for seed in range(100)]
    moved = torch.stack(one).double() - base.view(-1).double()
    tau = dense[0]
    ratio = moved[:, tau != 0] / tau[tau != 0]
    assert torch.minimum((ratio - 2).abs(), ratio.abs()).max() < 1e-3
    assert abs(float(ratio.mean()) - 1) < 0.1  # 100 x 24 draws: five standard deviations
    # Each delta has draws of its own: of a task merged with itself some changes are kept once, not twice or never.
    twice = merged(base, [paths[0], paths[0]], tmp_path / "m", how="dare", density=0.5, seed=7)
    of_tau = (twice.double() - base.view(-1).double()).view(-1)[tau != 0] / tau[tau != 0]
    assert of_tau.round().unique().tolist() == [0.0, 1.0, 2.0]
    again = merged(base, paths[:1], tmp_path / "m", how="dare", density=0.5, seed=7)
    assert torch.equal(again, one[7])


def test_merging_weights_sums_to_one_task_when_it_stands_alone(siblings: tuple, tmp_path: Path) -> None:
    base, paths = siblings
    for how in ("linear", "ties", "dare"):
        alone = merged(base, paths[1:2], tmp_path / "m", how=how)
        task = load_file(paths[1])
        assert torch.equal(alone[task["weight.indices"].long()], task["weight.values"])


def test_diff_refuses_what_is_not_alike(tmp_path: Path, capsys: Capture) -> None:
    one, wide = make_run(tmp_path / "a"), make_run(tmp_path / "b", dtype=torch.float32)
    other = make_run(tmp_path / "c", "qwen3")
    for folder, message in (
        (wide.base, "in one dtype"),
        (other.base, "different architectures"),
        (one.base, "no element"),
    ):
        with pytest.raises(SystemExit):
            delta("diff", one.base, folder, "--output", tmp_path / "f")
        assert message in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_what_cannot_be_computed_is_refused(run: Run, tmp_path: Path, capsys: Capture) -> None:
    bare = make_run(tmp_path / "bare", with_previous=False).deltas[0]
    one, out = run.deltas[0], ["--output", tmp_path / "f.safetensors"]
    capsys.readouterr()
    for arguments, message in (
        (["scale", one, "--alpha", "nan", *out], "expected a finite number"),
        (["scale", one, "--alpha", "inf", *out], "expected a finite number"),
        (["scale", one, "--alpha", "x", *out], "invalid float value"),
        (["scale", one, run.deltas[1], "--alpha", "0.5", *out], "takes one delta"),
        (["scale", bare, "--alpha", "0.5", *out], "no previous values"),
        (["scale", one, "--alpha", "1e300", *out], "too large"),
        (["prune", one, "--keep", "0", *out], "in (0, 1]"),
        (["prune", one, "--keep", "1.5", *out], "in (0, 1]"),
        (["prune", one, "--keep", "nan", *out], "in (0, 1]"),
        (["prune", bare, "--keep", "0.5", *out], "no previous values"),
        (["merge", run.base, run.folder, "--how", "ties", "--weights", "1,-1,1", *out], "above 0"),
        (["merge", run.base, run.folder, "--how", "linear", "--weights", "1,1", *out], "2 weights for 3"),
        (["merge", run.base, run.folder, "--how", "linear", "--weights", "a,b,c", *out], "commas between"),
        (["merge", run.base, run.folder, "--how", "linear", "--density", "0.5", *out], "no meaning"),
        (["merge", run.base, run.folder, "--how", "ties", "--density", "nan", *out], "in (0, 1]"),
        (["merge", run.base, run.deltas[0], run.deltas[2], "--how", "ties", *out], "neither of one base"),
        (["merge", run.base, *run.deltas[1:], "--how", "ties", *out], "in task order"),
        (
            ["merge", run.base, run.folder, "--weights", "1,1,1", "--output", tmp_path / "m"],
            "no meaning with --how replace",
        ),
        (["diff", run.base, run.final, "--ratio", "2", *out], "in (0, 1]"),
        (["diff", run.base, tmp_path / "no", *out], "found nothing there"),
        (["scale", one, "--alpha", "0.5", "--output", run.deltas[1]], "exists already"),
    ):
        with pytest.raises(SystemExit) as stopped:
            delta(*arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2, arguments
        assert message in error, (arguments, error)
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "f.safetensors").exists()


def test_a_scaled_delta_without_its_full_values_is_refused(run: Run, tmp_path: Path) -> None:
    delta("scale", run.deltas[0], "--alpha", 0.3, "--output", tmp_path / "a")
    tensors = rows(tmp_path / "a")
    metadata = {k: v for k, v in open_delta(tmp_path / "a").metadata.items() if k != "checksum"}
    name = next(n for n in tensors if n.endswith(".unscaled"))
    for change in (
        {n: t for n, t in tensors.items() if n != name},
        {**tensors, name: tensors[name][:-1].clone()},
        {**tensors, name: tensors[name].double()},
    ):
        save_file(change, tmp_path / "b", metadata)
        with pytest.raises(UserError):
            open_delta(tmp_path / "b")
    for scale in ("nan", "inf", "x", "1.0"):
        save_file(tensors, tmp_path / "b", metadata | {"scale": scale})
        with pytest.raises(UserError):
            open_delta(tmp_path / "b")


def test_scaled_values_of_zeros_infinities_and_nan() -> None:
    before = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1.0])
    change = Change(torch.arange(5), torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3.0]), before)
    for alpha in (0.0, 0.5, 1.0, 2.0):
        values = scaled_values(change, alpha)
        assert torch.equal(bits_of(values[:4]), bits_of(before[:4]))
        assert float(values[4]) == 1 + 2 * alpha


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_on_a_live_model_any_alpha_and_back(tmp_path: Path, family: str) -> None:
    made = make_run(tmp_path, family, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(made.base)
    task = AutoModelForCausalLM.from_pretrained(made.base)
    before = {name: param.detach().clone() for name, param in base.named_parameters()}
    live = apply_delta_(task, made.deltas[0])
    delta("apply", made.base, made.deltas[0], "--output", tmp_path / "there")
    wanted = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "there").named_parameters())
    assert same_bits({n: p.data for n, p in task.named_parameters()}, {n: p.data for n, p in wanted.items()})
    for alpha in (0.5, -1.0, 0.0):
        live.set_(alpha)
        assert same_bits({n: p.data for n, p in task.named_parameters()}, before) == (alpha == 0.0)
    live.set_(1.0)
    assert same_bits({n: p.data for n, p in task.named_parameters()}, {n: p.data for n, p in wanted.items()})
    wide = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)  # any dtype
    apply_delta_(wide, made.deltas[0], 1.0)
    assert all(torch.equal(param.data, wanted[name].float()) for name, param in wide.named_parameters())
    with pytest.raises(UserError, match="does not have"):
        apply_delta_(nn.Linear(2, 2), made.deltas[0])


def test_composing_and_listing_take_scaled_deltas(run: Run, tmp_path: Path, capsys: Capture) -> None:
    delta("scale", run.deltas[0], "--alpha", 0.3, "--output", tmp_path / "a")
    delta("compose", tmp_path / "a", "--output", tmp_path / "b")
    assert open_delta(tmp_path / "b").scale == 1.0
    delta("inspect", tmp_path / "a")
    assert "scaled by" in capsys.readouterr().out
