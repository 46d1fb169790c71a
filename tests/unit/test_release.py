"""The checks of a release: versions that differ are named, and the workflow runs the scripts that are here."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)  # type: ignore[union-attr]


def check(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "release" / "check_version.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def made(folder: Path, changelog: str) -> Path:
    """A checkout with only what the check reads."""
    (folder / "release").mkdir(exist_ok=True)
    for name in ("setup.py", "release/check_version.py"):
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "CHANGELOG.md").write_text(changelog)
    return folder


def test_tag_package_changelog_and_files_must_name_one_version(tmp_path: Path) -> None:
    root, dist = made(tmp_path, f"# Changelog\n\n## {VERSION}, 2030-01-02\n"), tmp_path / "dist"
    dist.mkdir()
    kinds = ("py3-none-any.whl", "cp311-abi3-manylinux_2_28_x86_64.whl", "cp311-abi3-manylinux_2_28_aarch64.whl")
    for name in (*(f"piece_ds-{VERSION}-{kind}" for kind in kinds), f"piece_ds-{VERSION}.tar.gz"):
        (dist / name).touch()
    assert check(f"v{VERSION}", str(dist), root=root).returncode == 0
    assert "the tag is v9.9.9" in check("v9.9.9", root=root).stderr
    (dist / f"piece_ds-{VERSION}-{kinds[2]}").rename(dist / f"piece_ds-9.9.9-{kinds[2]}")
    assert "is not of version" in check(f"v{VERSION}", str(dist), root=root).stderr
    (dist / f"piece_ds-9.9.9-{kinds[2]}").unlink()
    assert "lacks aarch64.whl" in check(f"v{VERSION}", str(dist), root=root).stderr
    made(tmp_path, f"## {VERSION}, not yet released\n")
    assert "not yet released" in check(f"v{VERSION}", root=root).stderr
    made(tmp_path, "## 9.9.9\n")
    assert "has no section" in check(f"v{VERSION}", root=root).stderr


WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
CHECKLIST = ROOT / "release" / "README.md"


def steps() -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values() for step in job["steps"]]


def test_the_workflow_has_its_jobs_in_order_and_publishes_tags_alone() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert {"test", "wheels", "install", "publish"} == set(jobs)
    assert set(jobs["publish"]["needs"]) == {"test", "install"}
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert jobs["publish"]["environment"] == "release"
    for job in jobs.values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys()
        # What a step or the job itself takes from the matrix is in every row of it.
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
        taken = set(re.findall(r"matrix\.(\w+)", yaml.safe_dump(job)))
        assert bool(rows) == bool(taken)
        assert all(taken <= row.keys() for row in rows)


def test_every_action_has_a_version_and_every_step_does_one_thing() -> None:
    actions = [step["uses"] for step in steps() if "uses" in step]
    assert actions
    for action in actions:
        assert re.fullmatch(r"actions/[\w-]+@v\d+(\.\d+)*", action), action
    assert all(("uses" in step) != ("run" in step) for step in steps())
    # What one job uploads the next ones download, in the same major version's format.
    assert {action.partition("@")[0] for action in actions} >= {"actions/upload-artifact", "actions/download-artifact"}


def test_the_workflow_and_the_checklist_name_scripts_that_exist() -> None:
    commands = "\n".join(step["run"] for step in steps() if "run" in step)
    for place in (commands, CHECKLIST.read_text()):
        named = set(re.findall(r"\b(?:release|bench)/\w+\.(?:py|sh)", place))
        assert named
        assert all((ROOT / name).is_file() for name in named)
    for name in re.findall(r"--constraint (\S+)", commands):
        assert (ROOT / name).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", commands)) == {"release"} <= extras.keys()


def test_every_target_of_make_that_is_named_anywhere_exists() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    (listed,) = re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert set(listed.split()) == targets
    pages = [WORKFLOW, CHECKLIST, ROOT / ".ci" / "run", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = {}
    for page in (*pages, *sorted((ROOT / "docs").glob("*.md"))):
        # As code: a command of its own, or between backticks.
        for name in re.findall(r"(?:^\s*(?:- run: )?|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
            named[name] = page.name
    assert {"test", "test-all", "train"} <= named.keys()
    assert named.keys() <= targets, {name: page for name, page in named.items() if name not in targets}
