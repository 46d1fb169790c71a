"""Which provider serves an op on a device. Chosen once per process and never exchanged behind the caller's back."""

from piece_ds.ops.schema import SCHEMAS

# device type -> op -> provider; compiled providers add their rows when they register.
_PROVIDERS: dict[str, dict[str, str]] = {device: dict.fromkeys(SCHEMAS, "reference") for device in ("cpu", "cuda")}


def provider(op: str, device_type: str) -> str:
    """Name of the implementation that runs `op` on tensors of device_type ('cpu', 'cuda')."""
    return _PROVIDERS[device_type][op]


def report() -> str:
    """A line per op: its provider on every device type."""
    lines = [f"{'op':<20}" + "".join(f"{device:<14}" for device in _PROVIDERS)]
    lines += [f"{op:<20}" + "".join(f"{rows[op]:<14}" for rows in _PROVIDERS.values()) for op in SCHEMAS]
    return "\n".join(lines)
