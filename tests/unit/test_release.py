"""The checks of a release: versions that differ are named, and the workflow runs the scripts that are here."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_the_workflow_and_the_checklist_name_scripts_that_exist() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert {"test", "wheels", "install", "publish"} == set(jobs)
    assert set(jobs["publish"]["needs"]) == {"test", "install"}
    for place in (text, (ROOT / "release" / "README.md").read_text()):
        named = set(re.findall(r"\b(?:release|bench)/\w+\.(?:py|sh)", place))
        assert named
        assert all((ROOT / name).is_file() for name in named)
