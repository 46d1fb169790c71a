"""Convert conversations of any tool to one form: turns of role and content, with OpenAI's names for the roles."""

from collections.abc import Sequence
from typing import Any

from piece_ds.data.rows import text_of, type_name
from piece_ds.runtime.errors import UserError, nearest

Messages = list[dict[str, str]]

# Each tool's word -> ours. Tool and function roles are left out: it is not settled which of their tokens give loss.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_IGNORED_KEYS = {"role", "content", "from", "value", "name", "id"}


def from_messages(messages: Messages, where: str, num_context: int = 0) -> dict[str, Any]:
    """Return the row of a conversation: its messages and num_context.

    Args:
        messages: from checked_messages().
        where: file and row, for the message.
        num_context: turns at the beginning that give no loss.
    Raises:
        UserError: no turn gives loss, or a system turn is not the first.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[num_context:]:
        raise UserError(f"{where}: no turn of the assistant among {roles[num_context:]}, so there is nothing to learn")
    if "system" in roles[1:]:
        raise UserError(f"{where}: a system turn at place {roles.index('system', 1) + 1}; it may only stand first")
    return {"messages": messages, "num_context": num_context}


def checked_messages(value: Any, key: str, where: str) -> Messages:
    """Return the turns of a list of {role, content} or {from, value}. An empty system turn is dropped.

    Args:
        value: what the row holds.
        key: its name in the row, for the message.
        where: file and row, for the message.
    Raises:
        UserError: value is no list of turns, or a turn has an unknown role, is empty, or holds images or tool calls.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key} must be a list of turns with role and content, got {type_name(value)}")
    turns = [_checked_turn(turn, f"{where}: {key} turn {index}") for index, turn in enumerate(value, start=1)]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _checked_turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with role and content, got {type_name(turn)}")
    # OpenAI's keys first, then ShareGPT's.
    keys = next((pair for pair in (("role", "content"), ("from", "value")) if all(key in turn for key in pair)), None)
    if keys is None:
        raise UserError(f"{where}: no role and content (or from and value), it has {sorted(map(str, turn))}")
    # An unknown key with a value (tool calls, images) may change what the turn means.
    unknown = [key for key, value in turn.items() if key not in _IGNORED_KEYS and value not in (None, [], "", {})]
    if unknown:
        raise UserError(f"{where}: {unknown[0]!r} in a turn is not supported; remove the key or the row")
    role = turn[keys[0]]
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(
            f"{where}: role {str(role)[:40]!r} is unknown; known: {known}.{nearest(str(role), list(ROLES))}"
        )
    content = text_of(_joined(turn[keys[1]], where), keys[1], where)
    if not content.strip() and ROLES[role] != "system":
        raise UserError(f"{where}: the turn of the {ROLES[role]} is empty; give it text or remove the row")
    return {"role": ROLES[role], "content": content}


def _joined(content: Any, where: str) -> Any:
    """Return the texts of a list of parts as one text; return anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise UserError(f"{where}: a part of content is {str(kind)[:40]!r}; only parts of type 'text' can be used")
    return "".join(part["text"] for part in content)


def from_sharegpt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the conversation of a ShareGPT row, with its system text first."""
    turns = checked_messages(row["conversations"], "conversations", where)
    return from_messages([*system_turn(row, where), *turns], where)


def from_alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an Alpaca row as a conversation: `system`, the pairs of `history`, then instruction and output.

    `input` follows the instruction on a line of its own, as LLaMA-Factory's README says.
    """
    question = text_of(row["instruction"], "instruction", where)
    given = row.get("input")
    if given not in (None, ""):
        question = f"{question}\n{text_of(given, 'input', where)}"
    pairs = [*_history(row.get("history"), where), (question, row["output"])]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    # Check under the row's own keys, so that messages name them.
    names = ("instruction", "output")
    for name, text in zip(names, pairs[-1], strict=True):
        if not text_of(text, name, where).strip():
            raise UserError(f"{where}: {name} is empty; give it text or remove the row")
    return from_messages([*system_turn(row, where), *checked_messages(turns, "history", where)], where)


def _history(value: Any, where: str) -> Sequence[Sequence[Any]]:
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise UserError(f"{where}: history must be a list of [question, answer], got {type_name(value)}")
    return value


def system_turn(row: dict[str, Any], where: str) -> Messages:
    """Return what a row says under `system` as a turn; no turn if it says nothing."""
    value = row.get("system")
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [{"role": "system", "content": text_of(value, "system", where)}]
