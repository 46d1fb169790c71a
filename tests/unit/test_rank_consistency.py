"""Ranks that were not started alike: what differs is found, and named with the ranks that have it."""

import datasets

from piece_ds.data.rows_digest import digest_of_rows
from piece_ds.data.tokenize import ENCODED
from piece_ds.preflight.rank_consistency import first_difference


def rows(labels: list[list[int]], **columns: list[str]) -> datasets.Dataset:
    """Encoded rows of three tokens with these labels."""
    found = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * len(labels), "labels": labels}, features=ENCODED)
    for name, values in columns.items():
        found = found.add_column(name, values)
    return found


def test_the_ranks_that_differ_from_most_are_named_first() -> None:
    """The right value is that of most ranks, whichever rank comes first; of as many, that of the lower rank."""
    alike = {"torch": "2", "rows": "a"}
    for of_ranks, said in (
        ([alike, alike], None),
        ([alike, alike | {"rows": "b"}], "rows: b on rank 1, a on rank 0"),
        ([alike | {"rows": "b"}, alike, alike], "rows: b on rank 0, a on rank 1, 2"),
        ([alike, alike | {"torch": "3"}, alike | {"rows": "b"}], "torch: 3 on rank 1, 2 on rank 0, 2"),
        ([{"torch": "2"}, alike, alike], "rows: absent on rank 0, a on rank 1, 2"),
    ):
        assert first_difference(of_ranks) == said, of_ranks


def test_rows_are_compared_by_every_token_and_not_by_their_places() -> None:
    plain = rows([[-100, 2, 3], [-100, 2, 3]])
    assert digest_of_rows(plain) == digest_of_rows(plain.select([1, 0]))  # equal rows
    assert digest_of_rows(plain) == digest_of_rows(rows([[-100, 2, 3]] * 2, where=["here row 1", "here row 2"]))
    others = [rows([[-100, 2, 3], [-100, 2, 4]]), rows([[-100, 2, 4], [-100, 2, 3]]), rows([[-100, 2, 3]])]
    assert len({digest_of_rows(each) for each in (plain, *others)}) == 4
