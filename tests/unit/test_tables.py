"""A table that is one test runs every case, and names the one that fails."""

import pytest
from support.tables import each


def test_every_combination_runs_and_the_failing_one_is_named() -> None:
    seen = []

    @each(first=[1, 2], second="ab")
    def check(first: int, fixture: str, second: str) -> None:
        seen.append((first, second, fixture))
        assert (first, second) != (2, "a")

    with pytest.raises(AssertionError) as error:
        check(fixture="given")
    assert seen == [(1, "a", "given"), (1, "b", "given"), (2, "a", "given")]
    assert error.value.__notes__ == ["case: first=2, second=a"]


@each(number=[1, 2])
def test_what_the_table_does_not_name_is_a_fixture(number: int, tmp_path: object) -> None:
    assert tmp_path
    assert number in (1, 2)


def test_a_table_without_cases_is_refused() -> None:
    with pytest.raises(AssertionError, match="would test nothing"):
        each(number=[])
