"""General text that a Linux machine with Python carries: documentation, manual pages, sources of the library.

Parted into learned and held out by a hash of each file's path, so that the split is that of the files and repeats
itself; a text that occurs under several names is kept once, so that no held-out file was learned under another name.
"""

import gzip
import hashlib
import html
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.continual.recipe import BaseRecipe

MIN_CHARACTERS = 400
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".html")
_ROFF = re.compile(r"\\f[A-Z0-9]|\\f\[[A-Z]*\]|\\f\([A-Z]{2}|\\[&|^/]")


@dataclass(frozen=True)
class Material:
    """Texts of files, in an order that only their paths decide, and where each kind ended up in bytes."""

    learned: list[str]
    held_out: list[str]
    kind_bytes: dict[str, int]

    @property
    def digest(self) -> str:
        """Of all texts: another machine has others."""
        found = hashlib.sha256()
        for text in (*self.learned, "\0", *self.held_out):
            found.update(text.encode() + b"\0")
        return found.hexdigest()[:12]


def collect(recipe: BaseRecipe) -> Material:
    """Read the material of recipe.

    Raises:
        RuntimeError: less than a tenth of what the recipe asks for: this machine carries no documentation.
    Cost: about 10 s.
    """
    learned: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    kind_bytes = {}
    for kind, most in recipe.kind_bytes:
        kind_bytes[kind] = 0
        for name, text in _KINDS[kind]():
            text = text[: recipe.file_bytes]
            if len(text) < MIN_CHARACTERS or text in seen:
                continue
            seen.add(text)
            (held_out if _part(name) < recipe.held_out_share else learned).append(text)
            kind_bytes[kind] += len(text.encode())
            if kind_bytes[kind] > most:
                break
    wanted = sum(most for _, most in recipe.kind_bytes)
    if sum(kind_bytes.values()) < wanted / 10:
        raise RuntimeError(
            f"general text: expected about {wanted:,} bytes, this machine has {kind_bytes}: "
            "install documentation packages, or give --base FOLDER"
        )
    return Material(learned, held_out, kind_bytes)


def _part(name: str) -> float:
    """A number in [0, 1) that a file's path decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _documents() -> Iterator[tuple[str, str]]:
    roots = [Path("/usr/share/doc"), Path("/usr/share/common-licenses"), Path(sysconfig.get_path("purelib"))]
    for name, path in _files(roots, lambda path: path.name.removesuffix(".gz").endswith(_TEXT_SUFFIXES)):
        yield name, _without_tags(_read(path)) if ".html" in path.name else _read(path)


def _manuals(folder: str = "", sections: str = "12578") -> Iterator[tuple[str, str]]:
    roots = [Path("/usr/share/man") / folder / f"man{section}" for section in sections]
    for name, path in _files(roots, lambda path: path.suffix == ".gz"):
        yield name, _without_roff(_read(path))


def _sources() -> Iterator[tuple[str, str]]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name, path in _files(roots, lambda path: path.suffix == ".py" and "site-packages" not in path.parts):
        yield name, _read(path)


_KINDS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "docs": _documents,
    "manuals": _manuals,
    "manuals in German": lambda: _manuals("de", "1578"),
    "sources": _sources,
}


def _files(roots: list[Path], wanted: Callable[[Path], bool]) -> Iterator[tuple[str, Path]]:
    """(path below its root, path) of the wanted files, in the order of their _part; links are left out."""
    found = [
        (f"{root.name}/{path.relative_to(root)}", path)
        for root in roots
        for path in root.rglob("*")
        if wanted(path) and path.is_file() and not path.is_symlink()
    ]
    yield from sorted(found, key=lambda item: (_part("order " + item[0]), item[0]))


def _read(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode("utf-8", errors="ignore").replace("\r\n", "\n")


def _without_tags(text: str) -> str:
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>", "", text)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(text)).strip()


def _without_roff(text: str) -> str:
    """Text of a manual page: requests and macros lose their name, fonts their marks."""
    lines = (line for line in text.splitlines() if not line.startswith((".\\", "'\\", ".de", ".ds", ".if", ".ie")))
    plain = (re.sub(r"^[.'][A-Za-z]{1,2}\b ?", "", line).replace("\\-", "-") for line in lines)
    return re.sub(r"\n\s*\n+", "\n\n", _ROFF.sub("", "\n".join(plain))).strip()
