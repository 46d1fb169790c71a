"""Deltas as adapters of PEFT: a tuner of our own, for PeftModel.from_pretrained(model, folder) after
register_peft_tuner().

A layer holds positions and values of the parameters that a delta changes, in any module, and writes them into the
base's own parameters when the adapter becomes active: the forward pass is the base's, at no cost. What was there is
kept and written back, so that switching, merging and unloading give the same bits as `piece_ds delta apply | revert`. A
base in another dtype gets the values in its own, as it would from the merged model's files.

PEFT's register_peft_method() takes only names of its own list. So register() fills the tables that it fills, which
PEFT exports. Read at 0.21.2. Only register_peft_tuner() imports this file, when it
is called: PEFT is an extra.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from piece_ds.state.partition import is_partitioned

PEFT_TYPE = "PIECE"
PREFIX = "piece_"
PARTS = ("indices", "values", "previous")


@dataclass
class PieceAdapterConfig(PeftConfig):
    """What adapter_config.json says.

    Attributes:
        counts: parameter name -> how many elements of it change.
        target_modules: unused and empty; PEFT reads it.
    """

    counts: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # Not a field, so not in the file: module -> its own parameters that change -> how many elements.
        self.modules: dict[str, dict[str, int]] = {}
        for name, count in self.counts.items():
            module, _, parameter = name.rpartition(".")
            self.modules.setdefault(module, {})[parameter] = count


class PieceAdapterLayer(nn.Module, BaseTunerLayer):
    """A module of the base, with the changes of any number of adapters beside it.

    Attributes:
        base_layer: the module. Its parameters hold the values of the adapters that are applied.
        merged_adapters: applied until they are unmerged, whatever is active.
    """

    adapter_layer_names = ()  # nothing here is trained, and no value may be cast

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self._sizes: dict[str, dict[str, int]] = {}
        # Adapters in the order in which they were written, with what each of them replaced.
        self._applied: list[tuple[str, dict[str, Tensor]]] = []

    def __getattr__(self, name: str) -> Any:
        """Return what the base module has under a name, for models that look into their modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def hold(self, adapter: str, counts: dict[str, int]) -> None:
        """Make room for an adapter, which PEFT then fills from its file.

        Raise ValueError if this process holds only a part of a parameter.
        """
        for parameter, count in counts.items():
            weight = self.base_layer.get_parameter(parameter)
            if is_partitioned(weight) or isinstance(weight, DTensor):
                raise ValueError(
                    f"adapter {adapter!r} expected whole parameters, {parameter!r} is partitioned over ranks: use "
                    "piece_ds.apply_delta_"
                )
            wide = torch.int64 if weight.numel() > torch.iinfo(torch.int32).max else torch.int32
            for part in PARTS:
                empty = torch.zeros(count, dtype=wide if part == "indices" else weight.dtype, device=weight.device)
                self._part(parameter, part)[adapter] = nn.Parameter(empty, requires_grad=False)
        self._sizes[adapter] = counts

    def _part(self, parameter: str, part: str) -> nn.ParameterDict:
        """Return one part of one parameter of all adapters. Made if it is missing."""
        name = f"{PREFIX}{parameter}_{part}"
        if name not in self._modules:
            self.add_module(name, nn.ParameterDict())
            self.other_param_names = (*self.other_param_names, name)
        return self._modules[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base module gives with the active adapters' values in it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        self._write(self._wanted())
        return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters (default: the active ones), to stay until unmerge().

        Raises:
            ValueError: the module holds other values than the adapter was made on, or, with safe_merge, one is not
                finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._sizes]
        for name in names if safe_merge else ():
            for parameter in self._sizes[name]:
                if not torch.isfinite(self._part(parameter, "values")[name]).all():
                    raise ValueError(f"adapter {name!r} holds values of {parameter!r} that are not finite")
        self._write([*self.merged_adapters, *names])
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Give the base module its own values back, to the bit."""
        self.merged_adapters = []
        self._write([])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base module: with the adapters' values, or with its own."""
        if merge:
            self.merge(safe_merge, adapter_names)
            self._write(self.merged_adapters)
        else:
            self.unmerge()
        return self.base_layer

    def enable_adapters(self, enabled: bool) -> None:
        """Let adapters be active, or give the base module its own values back."""
        super().enable_adapters(enabled)
        if not enabled:
            self.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; its values leave the base module first."""
        self._write([])
        self._sizes.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self._sizes)

    def _wanted(self) -> list[str]:
        """Return the adapters whose values the base module shall hold, in their order."""
        active = [] if self.disable_adapters else self.active_adapters
        return [*self.merged_adapters, *(name for name in active if name not in self.merged_adapters)]

    @torch.no_grad()
    def _write(self, names: list[str]) -> None:
        """Take the last adapters off and put others on, until exactly these are applied, in this order."""
        names = [name for name in names if name in self._sizes]
        while [name for name, _ in self._applied] != names[: len(self._applied)]:
            name, replaced = self._applied.pop()
            for parameter, values in replaced.items():
                self._flat(parameter)[self._positions(parameter, name)] = values
        for name in names[len(self._applied) :]:
            self._applied.append((name, self._replaced_by(name)))

    def _replaced_by(self, name: str) -> dict[str, Tensor]:
        """Write an adapter's values; return what was there. If that is not what it was made on, nothing is written."""
        found = {}
        for parameter in self._sizes[name]:
            found[parameter] = self._flat(parameter)[self._positions(parameter, name)]
            expected = self._part(parameter, "previous")[name]
            if not torch.equal(expected, found[parameter]):
                applied = [other for other, _ in self._applied]
                raise ValueError(
                    f"adapter {name!r} was made on other values of {parameter!r} than this module holds, with "
                    f"{applied or 'no adapter'} applied: load the base that it was made on, and activate the adapters "
                    "of a run in the run's order"
                )
        for parameter in found:
            values = self._part(parameter, "values")[name]
            self._flat(parameter)[self._positions(parameter, name)] = values
        return found

    def _flat(self, parameter: str) -> Tensor:
        """Return a parameter of the base module as one row, sharing its memory."""
        return self.base_layer.get_parameter(parameter).data.view(-1)

    def _positions(self, parameter: str, name: str) -> Tensor:
        return self._part(parameter, "indices")[name].long()


class PieceAdapterModel(BaseTuner):
    """What PEFT makes of a model for adapters of PieceAdapterConfig."""

    prefix = PREFIX
    tuner_layer_cls = PieceAdapterLayer

    @staticmethod
    def _check_target_module_exists(peft_config: PieceAdapterConfig, key: str) -> bool:
        return key in peft_config.modules

    def _prepare_adapter_config(self, peft_config: PieceAdapterConfig, model_config: dict) -> PieceAdapterConfig:
        return peft_config

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave every value in its parameter's dtype. PEFT widens those of trained adapters."""

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: PieceAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        """Wrap a module, if no other adapter has, and make room in it."""
        layer = target if isinstance(target, PieceAdapterLayer) else PieceAdapterLayer(target)
        layer.hold(adapter_name, peft_config.modules[current_key])
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place. PEFT's own expects it to have a `weight`."""
        setattr(parent, child_name, new_module)


def register() -> None:
    """Fill PEFT's tables. A second call changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PieceAdapterConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PieceAdapterModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX  # type: ignore[index]
