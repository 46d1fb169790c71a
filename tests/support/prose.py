"""Figures of the house, read from the sources: `python tests/support/prose.py` prints them as a table.

Words are judged by simple rules, so the figures are for comparison over time; tests/test_architecture.py holds those
that must not grow.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "piece_ds"
MAX_POSITIONAL = 5
FOREIGN = ("torch", "transformers", "accelerate", "deepspeed")

# Verbs that a summary of this code may begin with. One that is missing here is added, not written around.
IMPERATIVE = frozenset(
    """
    accept act add adopt advance allow announce append apply ask assert attach average await begin bind block
    bring build bypass cache call cast check choose chop clear clip close collate collect combine compare
    compile compose compute concatenate convert copy count create cut deal decay decide decline decode delete
    detach divide do download drain draw drop dump embed emit encode end ensure enter erase estimate evaluate
    exchange exit expand export extend fetch fill filter find finish fit flatten flush fold forget format free
    freeze gather generate get give go group guard hand hash hide hold ignore import initialise insert inspect
    install iterate join judge keep label leave let limit link list load locate lock log look lower make map
    mark mask match measure merge move multiply name note number offload open order pack pad parse partition
    pass pick place plan prepare print produce project provide prune push put raise rank read rebuild receive
    record reduce refuse register release reload remember remove rename render repeat replace report require
    reset reshape resolve restore resume return reverse revert round run sample save say scale score search
    seed select send serve set shard shorten show shuffle shut sign skip sort split stack start stay step stop
    store stream strip substitute subtract sum swap switch take tell tie time tokenize trace train translate
    trim truncate try turn undo unpack update use validate verify wait walk warn watch wrap write yield zero
    """.split()  # noqa: SIM905 - a list of words reads as one
)


def modules() -> list[Path]:
    """Return the Python modules of the package, compiled kernels' folders left out."""
    return sorted(
        path for path in PACKAGE.rglob("*.py") if not {"kernels", "csrc"} & set(path.relative_to(PACKAGE).parts)
    )


@cache
def tree_of(path: Path) -> ast.Module:
    """Return what a source says, parsed once for all rules."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of a source."""
    return tuple(ast.walk(tree_of(path)))


@dataclass(frozen=True)
class Call:
    """A call of a function of ours with many positional arguments."""

    file: str
    line: int
    name: str
    num_positional: int


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.ClassDef]]:
    """Yield every function and class of the package."""
    for path in modules():
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield path, node


def summaries() -> list[tuple[str, str]]:
    """Return (place, first line of the docstring) of every documented function; classes and modules are nouns."""
    found = []
    for path, node in functions():
        text = ast.get_docstring(node)
        if text and isinstance(node, ast.FunctionDef) and not _is_property(node):
            found.append((f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text.splitlines()[0]))
    return found


def _is_property(node: ast.FunctionDef) -> bool:
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return bool(names & {"property", "cached_property"})


def is_imperative(summary: str) -> bool:
    """Return whether a summary begins like an order."""
    return summary.split(" ")[0].strip(".,:;").lower() in IMPERATIVE and summary[0].isupper()


def own_names() -> set[str]:
    """Return names of functions and classes that piece_ds defines."""
    return {node.name for _, node in functions()}


def long_calls() -> list[Call]:
    """Return calls of our own functions with more than MAX_POSITIONAL positional arguments."""
    known, found = own_names(), []
    for path in modules():
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in known:
                    found.append(Call(str(path.relative_to(ROOT)), node.lineno, name, len(node.args)))
    return found


def private_names() -> dict[str, set[str]]:
    """Return file -> private names of torch, transformers, accelerate and deepspeed that it imports or reads.

    Names that the libraries' objects carry are told from ours only if the object is an imported module or class.
    """
    found: dict[str, set[str]] = {}
    for path in modules():
        bound: dict[str, str] = {}
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                bound |= {
                    alias.asname or alias.name.split(".")[0]: alias.name
                    for alias in node.names
                    if _is_foreign(alias.name)
                }
            if isinstance(node, ast.ImportFrom) and node.module and _is_foreign(node.module):
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        used = set(bound.values())
        used |= {_dotted(node, bound) for node in nodes_of(path) if isinstance(node, ast.Attribute)}
        private = {
            name for name in used if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        }
        if private:
            found[str(path.relative_to(ROOT))] = private
    return found


def _is_foreign(module: str) -> bool:
    return module.split(".")[0] in FOREIGN


def _dotted(node: ast.expr, bound: dict[str, str]) -> str:
    """An attribute as a dotted name from the library on; '' if it begins elsewhere."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, bound)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def arrows() -> set[tuple[str, str]]:
    """Return (package, package that it imports), inside functions too."""
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    found = set()
    for path in modules():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in nodes_of(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            parts = [name.split(".") for name in names]
            found |= {(own, p[1]) for p in parts if p[0] == "piece_ds" and len(p) > 1 and p[1] in packages - {own}}
    return {(own, other) for own, other in found if own not in ("__init__", "__main__")}


def figures() -> dict[str, float]:
    """Return every figure by what it counts."""
    lines = [line for path in modules() for line in path.read_text(encoding="utf-8").splitlines()]
    code = [line for line in lines if line.strip()]
    comments = [line for line in code if re.search(r"(^|\s)# (?!type:|noqa|fmt:)", line)]
    texts = summaries()
    loose = [path for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    return {
        "modules": len(modules()),
        "modules loose": len(loose),
        "packages": len({path.relative_to(PACKAGE).parts[0] for path in modules() if path.parent != PACKAGE}),
        "import arrows between packages": len(arrows()),
        "lines": len(lines),
        "comments per 100 lines": round(100 * len(comments) / len(code), 1),
        "documented functions": len(texts),
        "... whose first line is not imperative": sum(not is_imperative(text) for _, text in texts),
        "fmt: skip": sum("# fmt: skip" in line for line in lines),
        "calls with more than five positional arguments": len(long_calls()),
        "words a sentence in README": readme_words(),
    }


def readme_words() -> float:
    """Return words a sentence of README's prose: code, tables, headings and links' targets left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = [line for line in text.splitlines() if line.strip() and not line.startswith(("|", "#", "!"))]
    plain = re.sub(r"\]\([^)]*\)", "", " ".join(line.lstrip("-*> ") for line in prose))
    sentences = [part for part in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*\[])", plain) if part.strip()]
    return round(sum(len(sentence.split()) for sentence in sentences) / max(len(sentences), 1), 1)


def main() -> None:
    """Print the figures, and the commit that they are of."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(f"of {commit.stdout.strip()}")
    for name, value in figures().items():
        print(f"{name:48} {value:>8}")


if __name__ == "__main__":
    main()
