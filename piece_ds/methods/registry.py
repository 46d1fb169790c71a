"""METHODS: every method by name. table.py has the entries; users add estimators of their own here.

No other module knows a method by its name: what a method may be used with follows from its entry. A user's estimator
joins the table by register_estimator(). An installed package can also name an Estimator in an entry point of the group
`piece_ds.estimators`.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from torch import Tensor

from piece_ds.methods.method import Method, estimated
from piece_ds.methods.table import TABLE
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.runtime.extras import require_extra
from piece_ds.selection.estimators import (
    Estimator,
    Fragment,
    checked,
)

GROUP = "piece_ds.estimators"

METHODS: dict[str, Method] = {method.name: method for method in TABLE}


def register_estimator(
    name: str, function: Callable[[Fragment], Tensor], *, needs: str, help: str = "", source: str = "registered"
) -> None:
    """Add an importance estimator to METHODS. `--method NAME`, estimate_mask(method=NAME) and all else then know it.

    Args:
        name: a new one.
        function: Fragment -> scores of its elements: fp32, 1-D, >= 0, never NaN, larger is more important. It must
            depend only on the elements, not on where a fragment begins, so that any number of ranks selects the same.
        needs: what the fragment must hold: 'nothing' (function reads only weights, or draws), 'squares', 'sum' or 'sum
            and squares' of the gradients over the task's micro-batches.
        help, source: what it does and where it comes from, for --help.
    Raises:
        ValueError: the name is taken, or needs is none of these.
    Cost: a pass over the data if needs is not 'nothing'; 4 bytes per owned element, 8 with the sum.
    """
    _add(Estimator(name, function, needs), help, source)


def find_method(name: str) -> Method:
    """Return the method called name.

    Raises:
        UserError: there is none; the message names the nearest. Or it needs a library that is not installed.
    """
    _add_installed()

    # A misspelt name is answered with the nearest one.
    if name not in METHODS:
        known = list(METHODS)
        raise UserError(f"--method {name!r} is unknown; known: {', '.join(known)}.{nearest(name, known)}")
    method = METHODS[name]
    if method.extra:
        require_extra(method.extra, f"--method {name}")
    return method


def find_estimator(name: str) -> Estimator:
    """Return the estimator of a method that is one top-k of scores.

    Raises:
        UserError: the method is unknown or has no estimator.
    """
    estimator = find_method(name).estimator
    if estimator is None:
        known = [method.name for method in METHODS.values() if method.estimator is not None]
        raise UserError(f"method {name!r} is no importance estimator; known: {', '.join(known)}")
    return estimator


def names_of(kind: str) -> list[str]:
    """Return the names of all methods of a kind, in the table's order."""
    _add_installed()
    return [method.name for method in METHODS.values() if method.kind == kind]


def methods_help() -> str:
    """Return the table as text for --help."""
    _add_installed()
    return "; ".join(f"{method.name}: {method.help or method.source}" for method in METHODS.values())


def _add(estimator: Estimator, help: str, source: str) -> None:
    if estimator.name in METHODS:
        raise ValueError(f"method {estimator.name!r} is there already: register yours under another name")
    METHODS[estimator.name] = estimated(checked(estimator), help, source)


@cache
def _entry_points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the group's entry points. Cost: some 5 ms, once for each sys.path: every package's metadata is read."""
    return tuple(entry_points(group=GROUP))


_installed: set[str] = set()  # entry points that have been read


def _add_installed() -> None:
    """Add the estimators of installed packages, each once.

    Raises:
        UserError: an entry point cannot be imported, is no Estimator, or has a name that is taken.
    """
    # Read late, when a method is looked up: importing this package must not import others.
    for point in _entry_points(tuple(sys.path)):
        if point.value in _installed:
            continue
        _installed.add(point.value)
        try:
            estimator = point.load()
            if not isinstance(estimator, Estimator):
                raise TypeError(f"expected a piece_ds.Estimator, got {type(estimator).__name__}")
            _add(estimator, "", point.value)
        except Exception as error:  # another package's code: whatever it raises, its name must be said
            raise UserError(f"entry point {point.name} = {point.value} of {GROUP} cannot be used: {error}") from error
