"""Deltas pushed to a stand-in for the Hub and pulled from it: the same bytes, applied and reverted, or one line."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from support.deltas import Run, make_run, sha256_of
from support.hub_server import READER, WRITER, Hub, serve

from piece_ds.__main__ import main
from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.deltas.card import escaped, forgetting_grids
from piece_ds.deltas.published import Manifest, read_manifest
from piece_ds.deltas.remote import parse_remote, said_in_one_line
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.models.layout import layout_of
from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError
from piece_ds.state.statistics import GradientStats

pytestmark = pytest.mark.heavy

Capture = pytest.CaptureFixture[str]
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
REPOSITORY = "hf://user/deltas"
LAYOUT = layout_of(torch.nn.Linear(3, 2))


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three tasks with masks, results and a configuration that names a folder of this machine."""
    from support.deltas import random_mask
    from support.models import embedding_name, make_model

    run = make_run(tmp_path_factory.mktemp("run"), sharded=True)
    for task, path in enumerate(run.deltas):
        mask = random_mask(make_model("llama"), task, 0.05, lambda name: name != embedding_name("llama"))
        save_mask(path.parent / "mask.safetensors", mask)
    write_results(run.folder, ("law", "support", "code"))
    write_base(run.folder, str(run.base))
    return run


def write_results(folder: Path, tasks: tuple[str, ...], notes: tuple[str, ...] = ()) -> None:
    matrix = ResultMatrix(tasks, ("accuracy",) * len(tasks)).with_before(
        dict.fromkeys(tasks, 0.1), dict.fromkeys(tasks, 3.0), 2.0
    )
    for stage in range(len(tasks)):
        score = {task: 0.9 - 0.25 * (stage - i) if i <= stage else 0.1 for i, task in enumerate(tasks)}
        matrix = matrix.with_row(score, {task: 1 - value for task, value in score.items()}, 2.0 + 0.1 * stage)
    results = RunResults("piece-s", "piece-s", 0.05, matrix, notes=notes)
    (folder / "results.json").write_text(json.dumps(results.to_json()))


def write_base(folder: Path, name: str) -> None:
    (folder / "run.json").write_text(json.dumps({"ModelArguments": {"model_name_or_path": name}}))


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    folder = shutil.copytree(made.folder, tmp_path / "run")
    return Run(made.base, made.final, folder, [folder / path.relative_to(made.folder) for path in made.deltas])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + TEMPLATE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS alone
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        delta(*arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def front_matter(hub: Hub) -> dict[str, object]:
    card = hub.repositories["user/deltas"].files["README.md"].decode()
    return yaml.safe_load(card.split("---\n")[1])


def test_three_tasks_pushed_and_pulled_are_the_same_files_and_go_on_and_off(run: Run, hub: Hub, tmp_path: Path) -> None:
    delta("push", run.folder, REPOSITORY, "--with_masks")
    (tmp_path / "pulled").mkdir()
    delta("pull", REPOSITORY, "--output", tmp_path / "pulled", "--model", run.base)
    pulled, own = sha256_of(tmp_path / "pulled"), sha256_of(run.folder)
    kept = [f"{i:02d}-task/{kind}.safetensors" for i in range(3) for kind in ("delta", "mask")]
    assert {name: pulled[name] for name in kept} == {name: own[name] for name in kept}
    assert set(pulled) == {*kept, "piece_ds_deltas.json", "figures/results-accuracy.png"}
    delta("apply", run.base, tmp_path / "pulled", "--output", tmp_path / "new")
    assert {name: sha for name, sha in sha256_of(tmp_path / "new").items() if name != "piece_ds.json"} == sha256_of(
        run.final
    )
    delta("revert", tmp_path / "new", tmp_path / "pulled", "--output", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == sha256_of(run.base)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert list(tmp_path.glob(".*")) == []


def test_scaled_pruned_and_composed_deltas_of_every_coding_arrive_as_they_were(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    """Each is pushed by itself; applied after the pull, it gives the model that it gives here, and goes off again."""
    first, second = run.deltas[:2]
    made = {
        "scaled": ("scale", first, "--alpha", 0.5),
        "pruned": ("prune", first, "--keep", 0.3),
        "composed": ("compose", first, second),
    }
    for coding in ("indices", "gaps", "smallest"):
        for name, words in made.items():
            folder = tmp_path / coding / name / "00-task"
            folder.mkdir(parents=True)
            delta(*words, "--output", folder / "delta.safetensors", "--coding", coding)
            delta("push", folder.parent, REPOSITORY)
            pulled = tmp_path / coding / f"{name}-pulled"
            delta("pull", REPOSITORY, "--output", pulled, "--model", run.base)
            assert sha256_of(pulled)["00-task/delta.safetensors"] == sha256_of(folder)["delta.safetensors"]
            here, there, back = (tmp_path / coding / f"{name}-{kind}" for kind in ("here", "there", "back"))
            delta("apply", run.base, folder.parent, "--output", here)
            delta("apply", run.base, pulled, "--output", there)
            delta("revert", there, pulled, "--output", back)
            hashes = [{k: v for k, v in sha256_of(path).items() if k != "piece_ds.json"} for path in (here, there)]
            assert hashes[0] == hashes[1] != sha256_of(run.base)
            assert sha256_of(back) == sha256_of(run.base)


def test_general_statistics_are_pushed_if_asked_for(run: Run, hub: Hub, tmp_path: Path, capsys: Capture) -> None:
    assert "there are none in" in refused(capsys, "push", run.folder, REPOSITORY, "--with_general_statistics")
    sums = torch.arange(LAYOUT.num_owned, dtype=torch.float32)
    folder = run.folder / "general_statistics"
    save_statistics(folder, GradientStats(LAYOUT, sums, sums, 9, 2), {"file": "a.json"})
    (folder / "secret.txt").write_text("not of the statistics")
    main(["push", str(run.folder), REPOSITORY, "--with_general_statistics"])
    main(["pull", REPOSITORY, "--output", str(tmp_path / "pulled")])
    found = load_statistics(tmp_path / "pulled" / "general_statistics", LAYOUT, needs_sum=True)
    assert torch.equal(found.square_sum, sums)
    assert "general_statistics/secret.txt" not in hub.repositories["user/deltas"].files
    # A push without them takes them away again.
    delta("push", run.folder, REPOSITORY)
    assert not any(name.startswith("general_statistics/") for name in hub.repositories["user/deltas"].files)


def test_one_delta_is_pushed_and_pulled_alone(run: Run, hub: Hub, tmp_path: Path) -> None:
    lone = tmp_path / "HALF.safetensors"
    delta("scale", run.deltas[0], "--alpha", 0.5, "--output", lone)
    for number, source in enumerate((lone, run.deltas[0], run.deltas[0].parent)):
        delta("push", source, REPOSITORY)
        delta("pull", REPOSITORY, "--output", tmp_path / f"{number}")
        assert set(sha256_of(tmp_path / f"{number}")) == {"delta.safetensors", "piece_ds_deltas.json"}
        delta("apply", run.base, tmp_path / f"{number}", "--output", tmp_path / f"new{number}")


def test_the_card_says_what_the_deltas_go_on_and_what_was_measured(run: Run, hub: Hub) -> None:
    hub.add("org/base", card={"license": "apache-2.0"})
    write_base(run.folder, "org/base")
    delta("push", run.folder, REPOSITORY, "--datasets", "org/law, org/code")
    fields = front_matter(hub)
    assert fields["base_model"] == "org/base"
    assert fields["library_name"] == "piece_ds"
    assert fields["license"] == "apache-2.0"
    assert fields["datasets"] == ["org/law", "org/code"]
    assert "piece-s" in fields["tags"]
    manifest = json.loads(hub.repositories["user/deltas"].files["piece_ds_deltas.json"])
    assert fields["base_model_fingerprint"] == manifest["base"]["fingerprint"]
    assert len(manifest["base"]["fingerprint"]) == 16
    card = hub.repositories["user/deltas"].files["README.md"].decode()
    for line in (
        "hf download org/base --local-dir base\npiece_ds delta pull hf://user/deltas --output deltas\n"
        "piece_ds delta apply base deltas --output model\n",
        "| after code | 40.0 % | 65.0 % | 90.0 % | 65.0 % |",  # of the result matrix
        "| law | 90.0 % | 40.0 % | -50.0 |",  # of the forgetting table
        "| general text, from before the first task | 2.000 | 2.200 | +0.200 |",
        "(figures/results-accuracy.png)",
    ):
        assert line in card, card


def test_a_delta_without_previous_values_is_not_said_to_come_off(run: Run, hub: Hub, tmp_path: Path) -> None:
    delta("push", run.deltas[0], REPOSITORY)
    assert b"off again" in hub.repositories["user/deltas"].files["README.md"]
    small = tmp_path / "small.safetensors"
    delta("compose", run.deltas[0], "--without_previous", "--output", small)
    delta("push", small, REPOSITORY)
    card = hub.repositories["user/deltas"].files["README.md"]
    assert b"off again" not in card
    assert b"| no |" in card

    # One of several is enough to say so.
    mixed = tmp_path / "mixed"
    for number, source in enumerate((small, run.deltas[1], run.deltas[2])):
        (mixed / f"{number:02d}-task").mkdir(parents=True)
        shutil.copy(source, mixed / f"{number:02d}-task" / "delta.safetensors")
    delta("push", mixed, REPOSITORY)
    card = hub.repositories["user/deltas"].files["README.md"]
    assert b"off again" not in card
    assert b"| yes |" in card


def test_a_base_is_named_only_if_the_hub_has_it_and_no_path_is_told(run: Run, hub: Hub, capsys: Capture) -> None:
    (run.folder.parent / "base").mkdir()
    (run.folder.parent / "base" / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    for name, licence in (
        (str(run.folder.parent / "base"), "mit"),
        ("models/base", None),
        ("smollm2-135m", "apache-2.0"),
    ):
        write_base(run.folder, name)
        delta("push", run.folder, REPOSITORY)
        fields = front_matter(hub)
        assert "base_model" not in fields
        assert fields.get("license") == licence
        everything = b"".join(
            content
            for file, content in hub.repositories["user/deltas"].files.items()
            if file.endswith((".md", ".json"))
        )
        assert str(run.folder.parent).encode() not in everything
        assert (b"delta apply smollm2-135m deltas" in everything) == (name == "smollm2-135m")
    assert "org/none" in refused(capsys, "push", run.folder, REPOSITORY, "--base_model", "org/none")


def test_hostile_names_stay_text_in_the_card(run: Run, hub: Hub, tmp_path: Path) -> None:
    hostile = (
        "<img src=x onerror=alert(1)>|`x`",
        "a](javascript:x)[b\n# Heading",
        "\x1b[31mred\u202e---\nlicense: mit",
    )
    write_results(run.folder, hostile, notes=("note\n---\nbase_model: evil",))
    for number, path in enumerate(run.deltas):
        path.parent.rename(run.folder / f"{number:02d}-a*b`|<i>\u202e\x1b {'x' * 40}")
    delta("push", run.folder, REPOSITORY)
    card = hub.repositories["user/deltas"].files["README.md"].decode()
    _, block, body = card.split("---\n", 2)
    assert set(yaml.safe_load(block)) <= {"library_name", "base_model_fingerprint", "datasets", "tags"}
    assert "<" not in body
    assert not {"\x1b", "\u202e"} & set(card)
    assert "\n# Heading" not in body
    assert escaped(hostile[1]) == "a\\](javascript:x)\\[b\\\\n\\# Heading"
    tables = [part.splitlines() for part in body.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 5
    for table in tables:  # no name opens a cell of its own
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}) == 1, table
    delta("pull", REPOSITORY, "--output", tmp_path / "pulled")
    delta("apply", run.base, tmp_path / "pulled", "--output", tmp_path / "new")


def test_a_second_push_removes_its_old_files_and_keeps_those_of_others(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.add("user/deltas", {"notes.txt": b"mine", "weights/model.safetensors": b"x", "figures/a.png": b"x"})
    delta("push", run.folder, REPOSITORY, "--with_masks")
    first = hub.repositories["user/deltas"].branches["main"]
    shutil.rmtree(run.deltas[2].parent)
    delta("push", run.folder, REPOSITORY)
    files = hub.repositories["user/deltas"].files
    assert {name for name in files if "task" in name} == {"00-task/delta.safetensors", "01-task/delta.safetensors"}
    assert files["notes.txt"] == b"mine"
    assert {"weights/model.safetensors", "figures/a.png"} < set(files)
    delta("pull", REPOSITORY, "--revision", first, "--output", tmp_path / "first")  # the older commit is still whole
    assert len(list((tmp_path / "first").glob("*/mask.safetensors"))) == 3


def test_branches_pull_requests_and_private_repositories(run: Run, hub: Hub, tmp_path: Path, capsys: Capture) -> None:
    delta("push", run.folder, "hf://user/secret", "--private")
    secret = hub.repositories["user/secret"]
    assert secret.private
    delta("push", run.folder, "hf://user/secret", "--revision", "next/one", "--private")
    assert set(secret.branches) == {"main", "next/one"}
    delta("pull", "hf://user/secret", "--revision", "next/one", "--output", tmp_path / "next")
    before = dict(secret.branches)
    capsys.readouterr()
    delta("push", run.folder, "hf://user/secret", "--create_pr", "--with_masks")
    assert "/discussions/1" in capsys.readouterr().out
    assert {name: secret.branches[name] for name in before} == before
    delta("pull", "hf://user/secret", "--revision", "refs/pr/1", "--output", tmp_path / "pr")
    assert len(list((tmp_path / "pr").glob("*/mask.safetensors"))) == 3
    hub.add("user/open")
    assert "is public" in refused(capsys, "push", run.folder, "hf://user/open", "--private")
    assert hub.repositories["user/open"].files == {}


def test_what_cannot_be_pushed_is_one_line_and_changes_nothing(
    run: Run, hub: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/there")
    push = ("push", run.folder)
    for address in ("user/name", "hf://name", "hf://a/b/c", "hf://us er/x", "https://x/y/z", "hf://user/..", "hf://"):
        assert "hf://user/name" in refused(capsys, *push, address)
    assert "found nothing there" in refused(capsys, "push", run.folder / "none", REPOSITORY)
    assert "no repository" in refused(capsys, *push, REPOSITORY, "--create_pr")
    assert "no revision" in refused(capsys, *push, "hf://user/there", "--revision", "refs/pr/9")
    assert "--base_revision" in refused(capsys, *push, REPOSITORY, "--base_revision", "main")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "no permission" in refused(capsys, *push, REPOSITORY)
    assert "no permission" in refused(capsys, *push, "hf://user/there")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "no valid token" in refused(capsys, *push, "hf://user/there")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in refused(capsys, *push, REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, *push, REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(capsys, *push, REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for hub.broken in (b"<html>Please log in</html>", b"{}", b"[]", b"null"):  # a portal, or no Hub at all
        assert "nothing was pushed" in refused(capsys, *push, REPOSITORY)
        assert "nothing was pulled" in refused(capsys, "pull", REPOSITORY, "--output", run.folder.parent / "out")
    hub.broken = None
    with monkeypatch.context() as patched:  # the stand-in knows nothing of Xet, which an installed hf_xet asks for
        patched.setattr(constants, "HF_HUB_DISABLE_XET", False)
        if importlib.util.find_spec("hf_xet"):
            assert "nothing was pushed" in refused(capsys, *push, "hf://user/there")
    hub.refused_card = '"license" must be one of'
    assert '"license" must be one of' in refused(capsys, *push, "hf://user/there")
    assert set(hub.repositories) == {"user/there"}
    assert hub.repositories["user/there"].files == {}


def test_deltas_that_do_not_belong_together_are_not_pushed(run: Run, hub: Hub, capsys: Capture) -> None:
    (run.deltas[2].parent / "mask.safetensors").unlink()
    assert "--with_masks" in refused(capsys, "push", run.folder, REPOSITORY, "--with_masks")
    other = run.deltas[0].parent.rename(run.folder / "\u0660-task")  # another alphabet's zero
    assert "plain digits" in refused(capsys, "push", run.folder, REPOSITORY)
    other.rename(run.deltas[0].parent)
    shutil.copytree(run.deltas[1].parent, run.folder / "01-task!")
    run.deltas[1].parent.rename(run.folder / "01-task?")
    assert "would both be named" in refused(capsys, "push", run.folder, REPOSITORY)
    shutil.rmtree(run.folder / "01-task?")
    shutil.rmtree(run.folder / "01-task!")
    assert "missing, repeated" in refused(capsys, "push", run.folder, REPOSITORY)
    run.deltas[0].write_bytes(run.deltas[0].read_bytes()[:-1])
    refused(capsys, "push", run.folder, REPOSITORY)
    assert hub.requests == []


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(run: Run, hub: Hub, capsys: Capture) -> None:
    hub.add("user/deltas")
    hub.before_commit = lambda repository: repository.commit("main", {"other.txt": b"x"})
    assert "meanwhile" in refused(capsys, "push", run.folder, REPOSITORY)
    assert hub.repositories["user/deltas"].files == {"other.txt": b"x"}


def test_what_is_not_as_the_manifest_says_is_refused_and_leaves_nothing(
    run: Run, hub: Hub, tmp_path: Path, capsys: Capture
) -> None:
    delta("push", run.folder, REPOSITORY)
    repository = hub.repositories["user/deltas"]
    good, name = dict(repository.files), "01-task/delta.safetensors"
    manifest = json.loads(good["piece_ds_deltas.json"])

    def with_manifest(**changes: object) -> dict[str, bytes]:
        return {**good, "piece_ds_deltas.json": json.dumps({**manifest, **changes}).encode()}

    other = {**manifest["base"], "fingerprint": "0" * 16}
    entry = manifest["files"][name]
    gap = {path: other_entry for path, other_entry in manifest["files"].items() if path != name}
    flipped = good[name][:-1] + bytes([good[name][-1] ^ 1])
    cases = [
        ({**good, name: flipped}, "is not what its manifest says"),
        ({**good, name: good[name][:-1]}, "is not what its manifest says"),
        ({**good, name: good["00-task/delta.safetensors"]}, "is not what its manifest says"),
        ({path: content for path, content in good.items() if path != name}, "lacks a file"),
        ({path: content for path, content in good.items() if path != "piece_ds_deltas.json"}, "lacks a file"),
        (with_manifest(base=other), "not of the base"),
        (with_manifest(deltas=[name, "00-task/delta.safetensors", "02-task/delta.safetensors"]), "not of the base"),
        (
            with_manifest(deltas=["00-task/delta.safetensors", "02-task/delta.safetensors"], files=gap),
            "missing, repeated",
        ),
        (with_manifest(deltas=manifest["deltas"][:2]), "lists the file '02-task/delta.safetensors', and not its delta"),
        (with_manifest(files={**manifest["files"], "07-x/mask.safetensors": entry}), "and not its delta"),
        (with_manifest(deltas=[]), "does not list"),
        (with_manifest(deltas=[*manifest["deltas"], "03-x/delta.safetensors"]), "does not list"),
        (with_manifest(version=2), "piece_ds_deltas.json"),
        ({**good, "piece_ds_deltas.json": b"no json"}, "not JSON"),
    ]
    for path in (
        "../delta.safetensors",
        "/etc/delta.safetensors",
        "00-a/../../delta.safetensors",
        "x.py",
        "00-\x1b/delta.safetensors",
        "config.json",
        "figures/../x.png",
    ):
        cases.append((with_manifest(files={**manifest["files"], path: entry}), "cannot be"))
    before = sorted(tmp_path.iterdir())
    for files, reason in cases:
        repository.commit("main", files)
        assert reason in refused(capsys, "pull", REPOSITORY, "--output", tmp_path / "deep" / "out"), reason
        assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_pulled_is_one_line_and_writes_nothing(
    run: Run, hub: Hub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta("push", run.folder, REPOSITORY, "--private")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for here in (".", tmp_path / "here"):
        assert "runs in" in refused(capsys, "pull", REPOSITORY, "--output", here)
    pull = ("pull", REPOSITORY, "--output", tmp_path / "out")
    for taken in ("full", "full/file", "link"):
        assert "exists already" in refused(capsys, "pull", REPOSITORY, "--output", tmp_path / taken)
    assert "no revision 'none'" in refused(capsys, *pull, "--revision", "none")
    assert "no model can be loaded" in refused(capsys, *pull, "--model", tmp_path / "full")
    assert refused(capsys, *pull, "--model", run.final)  # the deltas are on it already
    assert "no repository" in refused(capsys, "pull", "hf://user/none", "--output", tmp_path / "out")
    monkeypatch.delenv("HF_TOKEN")
    assert "no repository" in refused(capsys, *pull)  # private, and there is no token
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, *pull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(capsys, *pull)
    assert sorted(tmp_path.rglob("*")) == before
    hub.repositories["user/deltas"].private = False
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    delta(*pull)  # public: no token is needed


def test_the_forgetting_of_each_task_counts_from_its_own_stage() -> None:
    matrix = ResultMatrix(("a", "b", "c"), ("accuracy",) * 3)
    for scores in ((0.9, 0.2, 0.1), (0.8, 0.7, 0.3), (0.5, 0.75, 0.6)):
        matrix = matrix.with_row(dict(zip("abc", scores, strict=True)), dict.fromkeys("abc", 1.0))
    rows = forgetting_grids(RunResults("x", "piece-s", 0.001, matrix))[0].rows
    assert rows == (
        ("a", "90.0 %", "50.0 %", "-40.0"),
        ("b", "70.0 %", "75.0 %", "+5.0"),
        ("c", "60.0 %", "60.0 %", "+0.0"),
    )


def test_what_is_pulled_is_one_commit_whatever_is_pushed_meanwhile(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta("push", run.folder, REPOSITORY)
    name = "00-task/delta.safetensors"

    def and_another_push(path: Path, origin: str) -> Manifest:
        repository = hub.repositories["user/deltas"]
        repository.commit("main", {**repository.files, name: b"of another run"})
        return read_manifest(path, origin)

    monkeypatch.setattr("piece_ds.deltas.hub.read_manifest", and_another_push)
    delta("pull", REPOSITORY, "--output", tmp_path / "pulled")
    assert sha256_of(tmp_path / "pulled")[name] == sha256_of(run.folder)[name]


def test_a_hub_that_is_switched_off_is_said_however_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own error, which another may wrap, or by any failure while it is switched off."""
    off = "the Hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
    wrapped = LocalEntryNotFoundError("not in the cache")
    wrapped.__cause__ = OfflineModeIsEnabled("offline")
    for is_off, error, wanted in (
        (False, OfflineModeIsEnabled("offline"), off),
        (False, wrapped, off),
        (True, LocalEntryNotFoundError("not in the cache"), off),
        (True, ConnectionError("nothing there"), off),
        (False, ConnectionError("nothing there"), r"hf://user/name: nothing there"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_off)
        with (
            pytest.raises(UserError, match=rf"^nothing was fetched: {wanted}"),
            said_in_one_line("fetched", parse_remote("hf://user/name")),
        ):
            raise error
