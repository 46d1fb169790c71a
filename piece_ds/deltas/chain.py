"""A chain of deltas: what training changed from one moment to the next, one small file a link.

    NN-task/chain/link-000000.safetensors     from the task's start to its first N steps
    NN-task/chain/link-000001.safetensors     from there to the next N, and so on; the last one ends at the task's end

A link is a delta without previous values, coded as small as possible. Its metadata say what it follows on:

    base_fingerprint, result_fingerprint      of all weights before and after it
    parent        checksum of the link before it, of the task before for a task's first; empty for the chain's first
    step, link    optimizer steps of the task so far, and the link's number in its folder, from 0

A link that is there is never written again: readers may have applied it.
"""

from dataclasses import dataclass
from pathlib import Path

from piece_ds.deltas.chain_files import link_file, link_files
from piece_ds.deltas.delta import Delta, open_delta
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class Link:
    """One link that has been read and checked.

    Attributes:
        delta: the file.
        number: in its folder.
        step: optimizer steps of its task so far.
        parent: checksum of the link before it; '' for the chain's first.
        base, result: fingerprints of all weights before and after it.
        checksum: its own.
    """

    delta: Delta
    number: int
    step: int
    parent: str
    base: str
    result: str
    checksum: str

    @property
    def path(self) -> Path:
        """The link's file."""
        return self.delta.path


def open_link(path: Path) -> Link:
    """Read and check a link.

    Raises:
        UserError: the file is damaged, or a delta that says nothing of a chain.
    """
    delta = open_delta(path, hold=True)
    metadata = delta.metadata
    needed = ("link", "step", "parent", "base_fingerprint", "result_fingerprint", "checksum")
    absent = next((key for key in needed if key not in metadata), None)
    if absent is not None:
        raise UserError(f"{path} is a delta, and no link of a chain: its metadata have no {absent!r}")
    if path.name != link_file(path.parent, int(metadata["link"])).name:
        raise UserError(f"{path} is link {metadata['link']} of its chain by its metadata: give it its name back")
    return Link(
        delta=delta,
        number=int(metadata["link"]),
        step=int(metadata["step"]),
        parent=metadata["parent"],
        base=metadata["base_fingerprint"],
        result=metadata["result_fingerprint"],
        checksum=metadata["checksum"],
    )


def require_follows(link: Link, before: Link | None) -> None:
    """Raise UserError unless a link continues where the one before it ended.

    Args:
        link: to be applied.
        before: the link before it; None if link is to be the chain's first.
    """
    if before is None:
        if link.parent or link.number:
            raise UserError(
                f"{link.path} is not the first link of its chain, and the links before it are not there: give the "
                "whole run, or weights that one of its links ends at"
            )
        return
    same_folder = link.path.parent == before.path.parent
    if same_folder and link.number > before.number + 1:
        raise UserError(f"link {before.number + 1} is missing between {before.path} and {link.path}: copy it again")
    if link.parent != before.checksum or link.base != before.result:
        raise UserError(
            f"{link.path} does not follow on {before.path}: it goes on weights {link.base}, that one ends at "
            f"{before.result}; a link is missing, repeated or of another run"
        )


def open_chain(folder: Path, before: Link | None = None) -> list[Link]:
    """Return the links of one folder, each checked against the one before it.

    Args:
        folder: of links.
        before: the link that the first one follows on; None for the chain's first folder.
    Raises:
        UserError: a link is damaged, missing or of another chain.
    """
    links: list[Link] = []
    for path in link_files(folder):
        link = open_link(path)
        if links or before is not None or link.parent:
            require_follows(link, links[-1] if links else before)
        links.append(link)
    return links
