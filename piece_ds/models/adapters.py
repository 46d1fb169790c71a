"""Refuse models with adapters of PEFT: what trains there is the adapter, and a mask names the model's own weights."""

from torch import nn

from piece_ds.runtime.errors import UserError


def refuse_adapters(model: nn.Module, who: str = "PIECE", before: str = "") -> None:
    """Raise UserError if model is wrapped by PEFT, or has one of its adapters inside, which no wrapper shows.

    Without this, no parameter would be eligible: the adapter freezes all but its own, and those move no weight of the
    model.

    Args:
        model: as the user gave it.
        who: what selects, for the message.
        before: what to do in place of merging, for the message; begins with a blank.
    """
    kind = type(model).__name__
    remedy = f"call merge_and_unload() and give what it returns, or unload() to train without the adapter{before}"
    if any(one.__name__ == "PeftModel" for one in type(model).__mro__):
        raise UserError(
            f"{who} selects among the model's own weights, got {kind}, whose adapter trains instead of them"
            f"{_named(model)}: {remedy}"
        )
    for name, part in model.named_modules():
        if type(part).__module__.startswith("peft."):
            raise UserError(
                f"{who} selects among the model's own weights, and {name!r} of this {kind} has an adapter of PEFT"
                f"{_named(part if hasattr(part, 'peft_config') else model)}, which trains instead of them: {remedy}"
            )


def _named(model: nn.Module) -> str:
    """Return the adapters by name and kind, as far as the model tells, in brackets."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return ""
    kinds = {name: getattr(config, "peft_type", "unknown") for name, config in configs.items()}
    return " (" + ", ".join(f"{name!r}: {getattr(kind, 'value', kind)}" for name, kind in kinds.items()) + ")"
