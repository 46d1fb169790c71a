"""A place that cannot be written is told before a job begins, and nothing is left there."""

import os
from pathlib import Path

from support.launches import tree

from piece_ds.runtime.places import why_no_file, why_no_folder
from piece_ds.training.output_place import why_blocked


def test_places_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "far")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    before = tree(tmp_path)

    folders = {
        "new": None, "new/below": None, "folder": None, "linked": None, "linked/new": None, "a\nb": None, "é/ü": None,
        "file": "is a file", "file/below": "lies below", "pipe": "is a file", "dangling": "a link to nothing",
        "itself": "a link to nothing", "itself/below": "a link to nothing", "x" * 256: "too long a name",
        "/".join(["x" * 200] * 25): "too long a name", "a\0b": "null byte", "a\udcff": "is no UTF-8 text",
    }  # fmt: skip
    files = {
        "new": None, "new/below": None, "file": None, "linked/new": None, "dangling": None, "folder": "is a folder",
        "linked": None, "pipe": "is a pipe", "file/below": "its folder is a file", "itself/below": "a link to nothing",
        "x" * 256: "too long a name", "a\0b": "null byte", "a\udcff": "is no UTF-8 text",
    }  # fmt: skip
    for cases, why in ((folders, why_no_folder), (files, why_no_file)):
        for name, said in cases.items():
            found = why(tmp_path / name)
            assert (found is None) if said is None else said in str(found), (why.__name__, name, found)
    assert tree(tmp_path) == before


def test_what_stands_in_a_runs_way_is_named(tmp_path: Path) -> None:
    assert why_blocked(tmp_path / "none") is None
    for name, make in (("predictions", Path.touch), ("figures", Path.touch), ("report.html", Path.mkdir)):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        assert why_blocked(folder) is None
        make(folder / name)
        assert name in str(why_blocked(folder))
