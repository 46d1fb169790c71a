"""The pages about the code name what is there: every box of the diagrams, every name, every public function."""

import ast
import re
from pathlib import Path

import pytest
from support.launches import ROOT

import piece_ds

PAGE = ROOT / "docs" / "one-step.md"
BOX = re.compile(r'"(piece_ds/[\w/]+\.py)<br/>([\w.]+)"')


def names_of(path: Path) -> set[str]:
    """Functions and classes of a module, and Class.method, those of its base classes in piece_ds/ included."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
    return found


def all_names() -> set[str]:
    return set().union(*(names_of(path) for path in (ROOT / "piece_ds").rglob("*.py")))


def test_every_box_of_the_diagrams_is_a_name_of_its_file() -> None:
    boxes = BOX.findall(PAGE.read_text(encoding="utf-8"))
    assert len(boxes) > 25
    for file, name in boxes:
        assert name in names_of(ROOT / file), f"{file}: {name}"


def test_every_box_is_of_the_code_or_said_to_be_deepspeed_s() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for label in re.findall(r'\w+\["([^"]*)"\]', text):
        assert label.startswith("DeepSpeed: ") or BOX.fullmatch(f'"{label}"'), label


def test_every_name_in_the_prose_exists() -> None:
    """Class.method and functions are ours; other names are DeepSpeed's, and our code uses them as they are written."""
    known = all_names()
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "piece_ds").rglob("*.py"))
    prose = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = re.findall(r"`([A-Za-z_][\w.]*)`", prose)
    assert len(names) > 25
    for name in names:
        assert name in known or re.search(rf"\b{re.escape(name)}\b", sources), name


@pytest.mark.parametrize("stage", ["stage0", "stage1_bf16", "stage12", "stage3"])
def test_every_stage_is_in_both_diagrams(stage: str) -> None:
    boxes = {
        name.rpartition(".")[2] for file, name in BOX.findall(PAGE.read_text("utf-8")) if file.endswith(f"{stage}.py")
    }
    assert {"mask_gradients_", "set_gradient"} <= boxes


def test_the_api_page_shows_every_public_name() -> None:
    """It is made from __all__; a name without a docstring would be left out."""
    assert "::: piece_ds\n" in (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in set(piece_ds.__all__) - {"__version__"}:
        assert (getattr(piece_ds, name).__doc__ or "").strip(), name


def test_types_travel_with_the_package() -> None:
    assert (ROOT / "piece_ds" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
