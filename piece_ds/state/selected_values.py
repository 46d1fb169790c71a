"""SelectedValues: the one flat parameter that DeepSpeed optimises in compact mode, as a module of the model.

It is never called, so ZeRO-3 never gathers it in forward or backward. The model's user does not see it: it is in no
layout, and state_dict() shows it only to training checkpoints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.runtime.errors import UserError

NAME = "piece_values"
PARAMETER_NAME = f"{NAME}.values"


class SelectedValues(nn.Module):
    """K values in the model's dtype: copies of the selected weights, in the order of (parameter, flat index).

    Attributes:
        values: the parameter, 1-D.
        trainable: names of the model's parameters that required gradients before they were frozen.
        eligible: those of them that may be selected by importance.
        decays: parameters whose selected elements weight decay acts on; None means all.
        may_have_fewer: whether a mask of fewer elements fits; the values after its own then stay 0.
        checkpoint: what a training checkpoint holds besides values: set before one is written, and by loading one.
        saving: whether a training checkpoint is being written.
        after_engine: undoes what else the model was prepared by, which its engine needs as long as it lives.
        attached: whether an update trains the values.
    """

    def __init__(
        self,
        num_selected: int,
        dtype: torch.dtype,
        device: torch.device,
        trainable: frozenset[str],
        eligible: frozenset[str],
        decays: frozenset[str] | None,
        may_have_fewer: bool = False,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_selected, dtype=dtype, device=device))
        self.trainable, self.eligible, self.decays = trainable, eligible, decays
        self.may_have_fewer = may_have_fewer
        self.after_engine: Callable[[], None] | None = None
        self.checkpoint: dict[str, Tensor] | None = None
        self.saving = False
        self.attached = False  # whether an update trains them: backward's gradients are then its own

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Return what a checkpoint holds besides values. torch calls it for state_dict()."""
        return self.checkpoint

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Keep what a checkpoint held besides values. torch calls it for load_state_dict()."""
        self.checkpoint = state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuse a checkpoint of another number of values; torch would end in a mismatch of sizes. See nn.Module."""
        found = state_dict.get(f"{prefix}values")
        if found is not None and found.numel() != self.values.numel():
            raise UserError(
                f"the checkpoint holds {found.numel()} selected values and this run selects {self.values.numel()}: "
                "resume with the ratio, unit, exclude and mask file that the checkpoint's run began with"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    @contextmanager
    def in_checkpoint(self, content: dict[str, Tensor]) -> Iterator[None]:
        """Make the model's state_dict() inside have values and content, and the model's own parameters only if whole.

        Args:
            content: 'positions' and 'whole' (see update/compact.py), and anything else to be there after loading.
        """
        self.checkpoint, self.saving = content, True
        try:
            yield
        finally:
            self.checkpoint, self.saving = None, False

    def join(self, model: nn.Module) -> None:
        """Add this module to model and freeze model's parameters.

        The model's state dict does not change for its user.
        """
        for param in model.parameters():
            param.requires_grad_(False)
        model.add_module(NAME, self)
        self._hooks = [
            model.register_state_dict_post_hook(_hide),
            model.register_load_state_dict_post_hook(_excuse_missing),
        ]

    def leave(self, model: nn.Module) -> None:
        """Undo join()."""
        for hook in self._hooks:
            hook.remove()
        delattr(model, NAME)

        # What was frozen before join() stays frozen.
        for name, param in model.named_parameters():
            param.requires_grad_(name in self.trainable)


def selected_values(model: nn.Module) -> SelectedValues | None:
    """Return the model's SelectedValues, or None if it was not prepared for compact mode."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, SelectedValues) else None


def _hide(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drop keys in a hook of state_dict(): see SelectedValues.in_checkpoint()."""
    values = selected_values(model)
    assert values is not None
    hidden: set[str] = set()

    # For the user, the values do not exist. In a checkpoint that is not whole, the weights do not.
    if not values.saving:
        hidden = {key for key in state if key.startswith(f"{prefix}{NAME}.")}
    elif not _whole(values):
        hidden = {prefix + name for name in _own_parameters(model)}
    for key in hidden & state.keys():
        del state[key]


def _excuse_missing(model: nn.Module, incompatible: Any) -> None:
    """Accept a state dict of the plain model and a checkpoint without it, in a hook of load_state_dict()."""
    values = selected_values(model)
    assert values is not None

    # The values themselves are never missed: a plain model has none.
    excused = set() if _whole(values) else _own_parameters(model)
    missing = [n for n in incompatible.missing_keys if not n.startswith(f"{NAME}.") and n not in excused]
    incompatible.missing_keys[:] = missing


def _whole(values: SelectedValues) -> bool:
    """Return whether the model's own parameters belong in the current checkpoint, or there is no checkpoint."""
    return values.checkpoint is None or bool(values.checkpoint["whole"])


def _own_parameters(model: nn.Module) -> set[str]:
    """Return names of the model's parameters, tied ones under every name, without that of SelectedValues."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - {PARAMETER_NAME}
