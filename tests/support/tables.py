"""Tests of many small cases: reporting a case costs more than running it, so a table is one test."""

import inspect
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any


def each(**table: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every combination of values, as one test; the case that fails is named below its error.

    Args:
        table: argument of the test -> its values. What is not named here stays a fixture, one for all cases: a test
            that changes a fixture needs parametrize.
    """
    columns = {name: tuple(values) for name, values in table.items()}
    assert all(columns.values()), "an argument without values would test nothing"

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(**fixtures: Any) -> None:
            for values in product(*columns.values()):
                case = dict(zip(columns, values, strict=True))
                try:
                    check(**case, **fixtures)
                except Exception as error:
                    error.add_note("case: " + ", ".join(f"{name}={value}" for name, value in case.items()))
                    raise

        arguments = inspect.signature(check).parameters.values()
        test.__signature__ = inspect.Signature([a for a in arguments if a.name not in columns])  # type: ignore[attr-defined]
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate
