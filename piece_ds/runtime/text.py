"""Make text from outside (names of files, tasks, runs, tensors) fit to print.

Each target has one function, used by everything that writes there:

- A terminal, a log, Markdown or a plain file: `printable()`.
- HTML: templates that escape values themselves (piece_ds/report/html.py), after `printable()`.
- A figure: a renderer that passes every text through `printable()` (piece_ds/report/style.py), with mathtext off.
- A table of rich: `rich.text.Text(printable(...))`, which reads no markup (piece_ds/report/table.py).
"""

import logging
import unicodedata

# Control characters, format characters (which can reverse the direction of writing), lone surrogates (which UTF-8
# cannot hold), private use, unassigned; and the two separators that end a line.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_KEPT = {"\u200c", "\u200d"}  # joiners, which Persian, Indic scripts and emoji need


def counted(number: int, noun: str) -> str:
    """Return '1 delta', '2 deltas'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: object, keep: str = "") -> str:
    """Return str(text) with every invisible character replaced by its escape, such as \\x1b.

    So a terminal receives no command, a file can be written as UTF-8, and a name stays on its line. Visible text is
    returned as it is. A second call changes nothing more.

    Args:
        text: anything. Python makes lone surrogates of bytes in a file name that are not UTF-8.
        keep: unprintable characters to leave, such as a newline.
    """
    text = str(text)
    # The common case, without looking at every character.
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if _is_visible(letter) or letter in keep else _escaped(letter) for letter in text)


def _is_visible(letter: str) -> bool:
    return letter in _KEPT or unicodedata.category(letter) not in _UNPRINTABLE


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class PrintableFormatter(logging.Formatter):
    """Log formatter that escapes every unprintable character except line breaks and tabs, which tracebacks need."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
