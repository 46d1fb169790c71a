"""Text from outside (names of files, tasks, runs, tensors) made fit to print.

One function a target, used by everything that writes there:

- a terminal, a log, Markdown, a plain file: `printable()`.
- HTML: templates that escape by themselves (piece_ds/report/html.py), which hand every value to `printable()` first.
- a figure: a renderer that hands every text to `printable()` (piece_ds/report/style.py), with mathtext off.
- a table of rich: `rich.text.Text(printable(...))`, which reads no markup (piece_ds/report/table.py).
"""

import logging
import unicodedata

# Control characters, format characters (which turn the direction of writing round), lone surrogates (which no UTF-8
# holds), private use, unassigned; and the two separators that end a line.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_KEPT = {"\u200c", "\u200d"}  # joiners, which Persian, Indic scripts and emoji are written with


def printable(text: object, keep: str = "") -> str:
    """Return str(text) with every character that is not to be seen as its escape, such as \\x1b.

    A terminal then receives no command, a file can be written as UTF-8, and a name stays in its line. Text of visible
    characters is returned as it is. Applying it twice changes nothing more.

    Args:
        text: anything; lone surrogates are what Python makes of bytes in a file's name that are no UTF-8.
        keep: unprintable characters to leave, such as a newline.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if _is_visible(letter) or letter in keep else _escaped(letter) for letter in text)


def _is_visible(letter: str) -> bool:
    return letter in _KEPT or unicodedata.category(letter) not in _UNPRINTABLE


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class PrintableFormatter(logging.Formatter):
    """A log's lines with every unprintable character escaped but line breaks and tabs, which tracebacks have."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
