"""Check that a tag, the package, the changelog and the files of a release name one version.

python release/check_version.py v0.1.0 [dist]
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(tag: str, dist: str | None = None) -> None:
    """Raise SystemExit with what differs."""
    version = problem_free(
        re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text()), "setup.py names no version"
    )
    if tag != f"v{version}":
        raise SystemExit(f"error: the tag is {tag}, setup.py says {version}")
    heading = re.search(rf"^## {re.escape(version)}\b(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if "not yet released" in problem_free(heading, f"CHANGELOG.md has no section {version}"):
        raise SystemExit(f"error: CHANGELOG.md says that {version} is not yet released: put the day there")
    files = [path.name for path in Path(dist).iterdir()] if dist else []
    wrong = next((name for name in files if name.split("-")[1].removesuffix(".tar.gz") != version), None)
    if wrong is not None:
        raise SystemExit(f"error: {wrong} is not of version {version}")
    kinds = {"none-any.whl", "x86_64.whl", "aarch64.whl", ".tar.gz"}
    missing = sorted(kind for kind in kinds if files and not any(name.endswith(kind) for name in files))
    if missing:
        raise SystemExit(f"error: the release lacks {', '.join(missing)}")
    print(f"{tag}: tag, package, changelog{' and files' if files else ''} agree")


def problem_free(match: re.Match[str] | None, problem: str) -> str:
    """Return what a pattern found, or raise SystemExit."""
    if match is None:
        raise SystemExit(f"error: {problem}")
    return match[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
