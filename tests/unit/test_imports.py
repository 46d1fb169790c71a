"""What is imported from the package elsewhere is there: in benchmarks, examples, scripts and programs inside tests."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from support.launches import ROOT

FOLDERS = ("bench", "kernels/bench", "examples", "launch", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
IN_TEXT = re.compile(r"^\s*from (piece_ds[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def imported(path: Path) -> set[tuple[str, str]]:
    """Return (module, name) of every `from piece_ds... import` in the code, and in programs that it holds as text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "piece_ds":
            found |= {(node.module or "", alias.name) for alias in node.names}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in IN_TEXT.findall(node.value):
                found |= {(module, name.split(" as ")[0].strip()) for name in names.split(",")}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_imported_name_exists(folder: str) -> None:
    missing = []
    for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
        for module, name in sorted(imported(path)):
            try:
                found = hasattr(import_module(module), name) or bool(import_module(f"{module}.{name}"))
            except ImportError:
                found = False
            if not found:
                missing.append(f"{path.relative_to(ROOT)}: from {module} import {name}")
    assert not missing, "\n".join(missing)
