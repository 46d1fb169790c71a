"""What few runs need is an extra of the package: nothing else imports it, and its absence is one line that names it."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from piece_ds.methods.registry import METHODS, find_method
from piece_ds.report.intervals import over_repetitions
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.extras import EXTRAS

ROOT = Path(__file__).parents[2]
NEED = {"lora": "peft", "o-lora": "peft", "peft": "peft", "gem": "statistics"}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without extras."""
    for module in (module for modules in EXTRAS.values() for module in modules):
        monkeypatch.setitem(sys.modules, module, None)


def test_methods_that_need_an_extra_say_which_one(plain: None) -> None:
    for name in METHODS:
        if name in NEED:
            with pytest.raises(UserError, match=rf"--method {name} needs \w+, .*'piece_ds\[{NEED[name]}\]'"):
                find_method(name)
        else:
            assert find_method(name).name == name


def test_an_interval_over_repetitions_says_what_it_needs(plain: None) -> None:
    assert over_repetitions([0.5]).mean == 0.5
    with pytest.raises(UserError, match=r"needs scipy, .*'piece_ds\[statistics\]'"):
        over_repetitions([0.5, 0.6])


def test_with_the_extras_nothing_is_refused() -> None:
    assert all(find_method(name).name == name for name in METHODS)


def test_no_module_imports_an_extra_before_it_is_used() -> None:
    """An import at the top of a file would end every command in a traceback.

    Classes that inherit from an extra's are in files of their own, which count as parts of it.
    """
    optional = {module for modules in EXTRAS.values() for module in modules}
    of_extras = {"piece_ds/deltas/peft_tuner.py": "piece_ds.deltas.peft_tuner"}
    for path in sorted((ROOT / "piece_ds").rglob("*.py")):
        if str(path.relative_to(ROOT)) in of_extras:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & optional, path
            assert not set(names) & set(of_extras.values()), path


def test_the_package_offers_these_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {line.partition(">")[0] for line in project["dependencies"]}
    for extra, modules in EXTRAS.items():
        assert {line.partition(">")[0] for line in project["optional-dependencies"][extra]} == set(modules)
        assert not required & set(modules)
    assert project["optional-dependencies"]["all"] == [f"piece_ds[{','.join(EXTRAS)}]"]
