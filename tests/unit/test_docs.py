"""What the pages name is there: links, the tests behind every guarantee, and the benchmarks' files."""

import re
from pathlib import Path

import pytest
from support.launches import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
TEST = re.compile(r"`((?:unit|ops|distributed|end_to_end|faults)/\w+\.py)(?:::([\w{},]+))?`")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {name}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {name}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {name for name, _ in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES[2:]} <= linked


def test_every_guarantee_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| guarantee")]
    assert len(rows) > 40
    for row in rows:
        named = TEST.findall(row.rsplit("|", 2)[1])
        assert named, row
        for file, function in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            for name in expanded(function):
                assert f"def {name}(" in text, f"{file}::{name}"


def expanded(name: str) -> list[str]:
    """'a_{b,c}_d' -> ['a_b_d', 'a_c_d']; no name, none."""
    if "{" not in name:
        return [name] if name else []
    head, choices, tail = re.split(r"[{}]", name)
    return [head + choice + tail for choice in choices.split(",")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_result_file_is_there(page: Path) -> None:
    for name in re.findall(r"`((?:kernels/)?bench/[\w/.-]*\.(?:csv|md|png))`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_it_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"`((?:piece_ds|tests|bench|kernels|csrc|launch|examples|ds_configs)/[\w/.-]+?)`", text)
    missing = [name for name in names if "NN" not in name and not (ROOT / name).exists()]
    assert not missing, f"{page.name}: {missing}"
