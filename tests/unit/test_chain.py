"""A chain of deltas: written as training goes, continued by a resumed run, and followed by live models to the bit."""

import copy
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from support.deltas import move_selected, random_mask
from support.models import cast_parameters, embedding_name, make_model
from support.ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.config.settings import parse
from piece_ds.deltas import ChainFollower, apply_delta_, open_delta
from piece_ds.deltas.chain import open_chain, require_follows
from piece_ds.deltas.chain_files import chain_folders, link_file, link_files
from piece_ds.deltas.live_fingerprint import live_fingerprint
from piece_ds.methods.registry import METHODS
from piece_ds.models.layout import layout_of
from piece_ds.preflight.checks import check_sources
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.state.weights_hash import hexadecimal
from piece_ds.training.chain_writer import ChainWriter
from piece_ds.zero.weights import read_selected, weights_fingerprint

pytestmark = pytest.mark.heavy

NUM_LINKS = 4


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone().view(torch.int16) for name, param in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def made_model() -> nn.Module:
    return cast_parameters(make_model("llama"), torch.bfloat16)


def made_mask(model: nn.Module, seed: int = 0) -> Mask:
    return random_mask(model, seed, 0.05, lambda name: name != embedding_name("llama"))


class Run:
    """A stand-in for a task's training: moves selected weights step by step, and writes links."""

    def __init__(self, folder: Path, model: nn.Module, seed: int = 0, before: Path | None = None) -> None:
        self.model, self.mask, self.seed = model, made_mask(model, seed), seed
        self.folder, self.before = folder, before
        self.previous = read_selected(model, self.mask)
        self.states = [weights(model)]
        self.writer = self.begin()

    def begin(self) -> ChainWriter:
        return ChainWriter(self.folder, self.model, self.mask, self.previous, before=self.before)

    def step(self, number: int) -> None:
        part = {name: index[number % 3 :: 3] for name, index in self.mask.index.items()}  # not all of it at a time
        part = {name: index for name, index in part.items() if index.numel()}
        move_selected(self.model, Mask(self.mask.layout, part, 0), 100 * self.seed + number)
        self.writer.write(number)
        self.states.append(weights(self.model))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "00-task" / "chain", made_model())
    made.model.save_pretrained(tmp_path / "base")
    for number in range(1, NUM_LINKS + 1):
        made.step(10 * number)
    return made


def base_of(run: Run) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(run.folder.parent.parent / "base")


def test_a_follower_goes_from_link_to_link_to_the_bit(run: Run) -> None:
    model = base_of(run)
    follower = ChainFollower(model, run.folder.parent)
    links = []
    for link in follower.follow(seconds=0):
        links.append(link)
        assert follower.apply_ms > 0
    assert [link.step for link in links] == [10, 20, 30, 40]
    assert [link.number for link in links] == [0, 1, 2, 3]
    assert same(weights(model), run.states[-1])
    assert follower.fingerprint == live_fingerprint(run.model) == links[-1].result
    # One that comes later begins anywhere on the chain, and new links are taken one by one.
    for stand in range(NUM_LINKS + 1):
        late = base_of(run)
        for path in link_files(run.folder)[:stand]:
            apply_delta_(late, path)
        assert same(weights(late), run.states[stand])
        assert len(ChainFollower(late, run.folder).apply_new()) == NUM_LINKS - stand
        assert same(weights(late), run.states[-1])
    assert follower.apply_new() == []
    run.step(50)
    assert [link.step for link in follower.apply_new()] == [50]
    assert same(weights(model), run.states[-1])


def test_a_follower_waits_for_a_chain_that_has_not_begun(run: Run, tmp_path: Path) -> None:
    model = base_of(run)
    follower = ChainFollower(model, tmp_path / "later")
    assert follower.apply_new() == []
    shutil.copytree(run.folder, tmp_path / "later" / "00-task" / "chain")
    assert len(follower.apply_new()) == NUM_LINKS
    assert same(weights(model), run.states[-1])


def test_links_are_deltas_that_folders_take(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["delta", "apply", str(tmp_path / "base"), str(run.folder), "--output", str(tmp_path / "there")])
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "there")), run.states[-1])
    main(["delta", "compose", str(run.folder), "--without_previous", "--output", str(tmp_path / "one")])
    one = base_of(run)
    apply_delta_(one, tmp_path / "one")
    assert same(weights(one), run.states[-1])
    assert open_delta(tmp_path / "one").metadata["step"] == "40"
    main(["delta", "list", str(run.folder)])
    listed = capsys.readouterr().out
    assert "link-000003" in listed
    assert not re.search(r"0\.\d{8}", listed)  # a link's ratio is what it changes, and has 17 digits
    # Written whole, and with nothing beside them.
    assert sorted(path.name for path in run.folder.iterdir()) == [link_file(run.folder, n).name for n in range(4)]


def test_metadata_say_base_step_and_parent(run: Run) -> None:
    links = open_chain(run.folder)
    base = hexadecimal(int(weights_fingerprint(base_of(run), Mask(run.mask.layout, {}, 0))))
    assert (links[0].base, links[0].parent) == (base, "")
    for before, link in pairwise(links):
        assert (link.base, link.parent) == (before.result, before.checksum)
    with safe_open(links[2].path, framework="pt") as file:
        assert (file.metadata()["step"], file.metadata()["link"], file.metadata()["version"]) == ("30", "2", "2")
    assert not any(link.delta.reversible for link in links)


def test_a_wrong_base_and_a_missing_repeated_or_damaged_link_are_refused(run: Run, tmp_path: Path) -> None:
    other = base_of(run)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[7] += 1  # a weight that no link changes
    before = weights(other)
    with pytest.raises(UserError, match="neither those that"):
        ChainFollower(other, run.folder).apply_new()
    assert same(weights(other), before)

    damages: dict[str, tuple[Callable[[Path], object], str, int]] = {
        "missing": (lambda f: link_file(f, 1).unlink(), "link 1 is missing", 1),
        "repeated": (lambda f: shutil.copy(link_file(f, 0), link_file(f, 1)), "link 0 of its chain", 1),
        "exchanged": (lambda f: os.replace(link_file(f, 2), link_file(f, 1)), "link 2 of its chain", 1),
        "damaged": (lambda f: flip(link_file(f, 2)), "damaged", 2),
        "a task's delta": (lambda f: write_plain(run, link_file(f, 3)), "no link of a chain", 3),
    }
    for what, (damage, message, num_applied) in damages.items():
        folder = tmp_path / what / "chain"
        shutil.copytree(run.folder, folder)
        damage(folder)
        model = base_of(run)
        follower = ChainFollower(model, folder)
        with pytest.raises(UserError, match=message) as error:
            follower.apply_new()
        assert "\n" not in str(error.value)
        # What was applied before is whole, nothing of the rest is.
        assert same(weights(model), run.states[num_applied]), what
        assert follower.fingerprint == live_fingerprint(model), what


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def write_plain(run: Run, path: Path) -> None:
    from piece_ds.checkpoint.delta_file import save_delta

    save_delta(path, run.model, run.mask, run.previous)


def test_weights_that_something_else_has_changed_are_refused(run: Run) -> None:
    paths = link_files(run.folder)
    model = base_of(run)
    kept = [path.rename(path.with_suffix(".later")) for path in paths[2:]]
    follower = ChainFollower(model, run.folder)
    assert len(follower.apply_new()) == 2
    name, change = next(iter(open_delta(kept[0]).changes()))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[change.index[0]] += 1
    before = weights(model)
    kept[0].rename(paths[2])
    with pytest.raises(UserError, match="something else has changed the model"):
        follower.apply_new()
    assert same(weights(model), before)


def test_a_resumed_run_continues_the_chain_and_rewrites_no_link(run: Run) -> None:
    """It resumes at step 20 and takes other steps than the first time; readers end at its weights all the same."""
    written = {path: path.read_bytes() for path in link_files(run.folder)}
    go_back(run, 2)
    run.writer = run.begin()
    for number in (30, 35, 40, 45):
        run.step(number)
    assert {path: path.read_bytes() for path in written} == written
    model = base_of(run)
    follower = ChainFollower(model, run.folder)
    assert [link.step for link in follower.apply_new()] == [10, 20, 30, 40, 45]
    assert same(weights(model), run.states[-1])
    # The last link comes whatever its step is: training may end where a link was, or scale its changes afterwards.
    run.writer = run.begin()
    move_selected(run.model, run.mask, 99)
    run.writer.write(45)
    assert follower.apply_new() == []
    run.writer.write(45, is_last=True)
    assert [link.step for link in follower.apply_new()] == [45]
    assert same(weights(model), weights(run.model))


def test_a_chain_goes_on_over_tasks(run: Run, tmp_path: Path) -> None:
    second = Run(tmp_path / "01-task" / "chain", run.model, seed=1, before=run.folder)
    second.step(10)
    second.step(20)
    assert chain_folders(tmp_path) == [run.folder, second.folder]
    model = base_of(run)
    assert len(ChainFollower(model, tmp_path).apply_new()) == NUM_LINKS + 2
    assert same(weights(model), second.states[-1])
    assert open_chain(second.folder, open_chain(run.folder)[-1])[0].number == 0
    # A task without a link before it begins no chain of its own.
    with pytest.raises(UserError, match="neither those that"):
        ChainFollower(base_of(run), second.folder).apply_new()


def go_back(run: Run, state: int) -> None:
    with torch.no_grad():
        for name, param in run.model.named_parameters():
            param.copy_(run.states[state][name].view(torch.bfloat16))


def test_links_of_another_run_or_mask_end_the_run_in_one_line(run: Run, tmp_path: Path) -> None:
    other = made_model()
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[3] += 1
    with pytest.raises(UserError, match="of another run"):
        Run(run.folder, other)
    go_back(run, 0)
    with pytest.raises(UserError, match="mask leaves alone"):
        Run(run.folder, run.model, seed=5)
    flip(link_files(run.folder)[1])
    with pytest.raises(UserError, match="damaged"):
        run.begin()


def test_steps_that_change_nothing_write_no_link(tmp_path: Path) -> None:
    made = Run(tmp_path, made_model())
    made.writer.write(1)
    made.writer.write(2)
    assert link_files(tmp_path) == []
    made.step(3)
    made.writer.write(4)
    assert len(link_files(tmp_path)) == 1


def test_another_dtype_follows_without_the_check(run: Run) -> None:
    wide = base_of(run).float()
    with pytest.raises(UserError, match="same dtype"):
        ChainFollower(wide, run.folder).apply_new()
    assert len(ChainFollower(wide, run.folder, check_weights=False).apply_new()) == NUM_LINKS
    for name, param in wide.named_parameters():
        assert torch.equal(param, run.states[-1][name].view(torch.bfloat16).float())


class _Odd(nn.Module):
    """Parameters that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Linear(7, 5, bias=True, dtype=torch.bfloat16)
        self.two = nn.Linear(5, 3, bias=True, dtype=torch.bfloat16)


def _odd_run(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Links of a model of odd shapes; returns it before and after."""
    model = _Odd()
    base = copy.deepcopy(model)
    whole = random_mask(model, 0, 0.4, lambda name: True)
    parts = {info.name: whole.layout.partition(info) for info in whole.layout.parameters}
    owned = {n: index[(index >= parts[n].start) & (index < parts[n].stop)] for n, index in whole.index.items()}
    mask = Mask(whole.layout, {n: index for n, index in owned.items() if index.numel()}, whole.num_selected, "piece-s")
    writer = ChainWriter(folder, model, mask, read_selected(model, mask))
    for step in range(3):
        move_selected(model, whole, step)
        writer.write(step + 1)
    return base, model


PLACEMENTS = {
    "rows": (Replicate(), Shard(0)),
    "columns": (Shard(1), Replicate()),
    "both": (Shard(0), Shard(1)),
    "rows over all": (Shard(0), Shard(0)),
    "copies": (Replicate(), Replicate()),
}


@pytest.mark.parametrize("what", [*PLACEMENTS, "fsdp"])
def test_models_of_dtensors_follow_on_four_ranks(tmp_path: Path, what: str) -> None:
    base, after = _odd_run(tmp_path / "chain")
    fingerprints = live_fingerprint(base), live_fingerprint(after)

    def work() -> list[bool]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
        model = copy.deepcopy(base)
        if what == "fsdp":
            fully_shard(model, mesh=mesh)  # sharded over one dimension, copied over the other
        else:
            for module in (model.one, model.two):
                for name, param in list(module.named_parameters()):
                    placements = PLACEMENTS[what] if param.dim() == 2 else (Replicate(), Shard(0))
                    module.register_parameter(name, nn.Parameter(distribute_tensor(param.data, mesh, placements)))
        checks = [live_fingerprint(model) == fingerprints[0]]
        links = ChainFollower(model, tmp_path / "chain").apply_new()
        checks += [len(links) == 3, live_fingerprint(model) == fingerprints[1]]
        wanted = dict(after.named_parameters())
        for name, param in model.named_parameters():
            whole = param.data.full_tensor() if isinstance(param.data, DTensor) else param.data
            checks.append(torch.equal(whole, wanted[name]))
        dist.barrier()
        return checks

    assert all(all(checks) for checks in on_ranks(4, work))


def test_the_layout_of_ranks_changes_no_link(tmp_path: Path) -> None:
    """Two ranks that each own a part of every parameter write what one rank writes."""
    _odd_run(tmp_path / "one" / "chain")
    on_ranks(2, lambda: _odd_run(tmp_path / "two" / "chain"))
    first, second = ([path.read_bytes() for path in link_files(tmp_path / name / "chain")] for name in ("one", "two"))
    assert len(first) == 3
    assert first == second
    assert layout_of(_Odd()).num_ranks == 1


def test_the_flag_is_refused_where_it_would_be_ignored() -> None:
    for method in [name for name, method in METHODS.items() if not method.has_mask]:
        with pytest.raises(UserError, match=f"--delta_every has no meaning with --method {method}"):
            check_sources(parse(["--method", method, "--delta_every", "2"]), 1)
        with pytest.raises(UserError, match=f"--delta_coding has no meaning with --method {method}"):
            check_sources(parse(["--method", method, "--delta_coding", "smallest"]), 1)
    for value in ("0", "-1"):
        with pytest.raises(UserError, match="--delta_every must be positive"):
            parse(["--delta_every", value])


def test_a_link_follows_only_if_both_its_parent_and_its_base_are_what_came_before(tmp_path: Path) -> None:
    """Weights may be the same by chance, as after a step that was taken back; a parent's name alone proves nothing."""
    before: Any = SimpleNamespace(path=tmp_path / "a", number=0, checksum="c0", result="w0")
    for parent, base, number, said in (
        ("c0", "w0", 1, None),
        ("c9", "w0", 1, "does not follow"),
        ("c0", "w9", 1, "does not follow"),
        ("c0", "w0", 2, "is missing"),
    ):
        link: Any = SimpleNamespace(path=tmp_path / "b", number=number, parent=parent, base=base)
        with nullcontext() if said is None else pytest.raises(UserError, match=said):
            require_follows(link, before)


def test_following_ends_only_once_no_new_link_has_come_for_the_time(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link comes every second; 1.5 seconds without one end it, however long the chain has been followed."""
    later, clock = tmp_path / "later" / "00-task" / "chain", [0.0]
    later.mkdir(parents=True)
    paths = link_files(run.folder)

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] % 1 == 0 and clock[0] <= len(paths):
            shutil.copy(paths[int(clock[0]) - 1], later)

    monkeypatch.setattr(
        "piece_ds.deltas.follow.time",
        SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: 0.0, sleep=sleep),
    )
    model = base_of(run)
    links = ChainFollower(model, tmp_path / "later").follow(seconds=1.5, poll_seconds=0.25)
    assert [link.step for link in links] == [10, 20, 30, 40]
    assert clock[0] == len(paths) + 1.5
    assert same(weights(model), run.states[-1])
