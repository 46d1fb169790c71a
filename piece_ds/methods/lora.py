"""LoRA, one adapter through the whole stream; and O-LoRA, an adapter per task, orthogonal to earlier ones. On peft."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.methods.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.models.layout import full_shape
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import collective_device
from piece_ds.zero.gradient_term import GradientTerm
from piece_ds.zero.weights import read_whole

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

FOLDER = "adapter"


class LoRA(Baseline):
    """Sequential LoRA: one adapter is trained on from task to task, and the base model is frozen.

    The task's model folder holds the adapter merged into the base model, in its dtype. `adapter` beside it holds the
    adapter as peft writes it; a stream is resumed from there.

    Source: LoRA (Hu et al., arXiv 2106.09685), by peft.
    """

    resumes_inside = False
    saves_itself = True
    scalable = "first"

    def scaled_names(self, model: nn.Module) -> list[str]:
        # B begins at zero: alpha times it is alpha times the whole change.
        return [name for name, param in model.named_parameters() if param.requires_grad and ".lora_B." in name]

    def adapter_names(self, num_tasks: int) -> list[str]:
        """Return the names of the stream's adapters, as peft knows them."""
        return ["default"]

    def adapt(self, model: nn.Module, num_tasks: int, previous: Path | None) -> nn.Module:
        names = self.adapter_names(num_tasks)
        if previous is not None:
            return _resumed(model, previous / FOLDER, names)

        from peft import get_peft_model

        # adapt() is called once, so the adapters of all tasks are made here.
        try:
            adapted = get_peft_model(model, self._config(), adapter_name=names[0])
            for name in names[1:]:
                adapted.add_adapter(name, self._config())
        except ValueError as error:
            raise UserError(f"--lora_target_modules {self.settings.lora_target_modules}: {error}") from error
        return adapted

    def _config(self) -> "LoraConfig":
        from peft import LoraConfig

        targets = self.settings.lora_target_modules
        return LoraConfig(
            r=self.settings.lora_r,
            lora_alpha=self.settings.lora_alpha,
            lora_dropout=self.settings.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )

    def save_model(self, model: nn.Module, state: dict[str, Tensor], context: TaskContext, to: Path | None) -> None:
        from peft import PeftModel

        assert isinstance(model, PeftModel)

        # The adapter first: a stream resumes from it. The merged model is for the user.
        model.save_pretrained(str(context.folder / FOLDER), state_dict=state)
        if to is not None:
            model.get_base_model().save_pretrained(str(to), state_dict=merged(model, state))


def _resumed(model: nn.Module, folder: Path, names: list[str]) -> nn.Module:
    """Return model with the adapters that folder holds. peft gives every adapter but `default` its own folder."""
    places = {name: folder if name == "default" else folder / name for name in names}
    if not all((place / "adapter_config.json").is_file() for place in places.values()):
        raise UserError(f"{folder} does not hold the adapters {', '.join(names)}: the stream cannot go on from there")

    from peft import PeftModel

    # The first adapter makes the PeftModel; the others join it.
    first, *rest = names
    adapted = PeftModel.from_pretrained(model, places[first], adapter_name=first, is_trainable=True)
    for name in rest:
        adapted.load_adapter(places[name], adapter_name=name, is_trainable=True)
    return adapted


def merged(model: "PeftModel", state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's state with the active adapters added, from the whole model's state.

    Args:
        model: only its structure and scaling are read; its weights may be partitioned.
        state: names as in model.state_dict(), whole tensors.
    Returns:
        names as in the base model's state_dict(), in its dtypes; sums are taken in fp32 and rounded once.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    prefix = "base_model.model."
    found = {}
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name or not name.startswith(prefix):
            continue

        # peft calls an adapted layer's own weight base_layer.weight.
        layer_name = owner.removesuffix(".base_layer")
        if layer_name in layers and owner.endswith(".base_layer") and leaf == "weight":
            tensor = _with_adapters(tensor, layer_name, layers[layer_name], state)
        found[f"{layer_name}.{leaf}".removeprefix(prefix)] = tensor
    return found


def _with_adapters(weight: Tensor, name: str, layer: "LoraLayer", state: dict[str, Tensor]) -> Tensor:
    # In fp32, rounded once at the end.
    total = weight.float()
    for adapter in layer.active_adapters:
        a, b = (state[f"{name}.lora_{x}.{adapter}.weight"].float() for x in "AB")
        delta = layer.scaling[adapter] * (b @ a)
        total = total + (
            delta.T if getattr(layer, "fan_in_fan_out", False) else delta
        )  # Conv1D keeps its weight transposed
    return total.to(weight.dtype)


class OLoRA(LoRA):
    """An adapter per task, all added up. Only the newest is trained, its A held orthogonal to every earlier A.

    The penalty is lambda * sum over layers and earlier tasks of |A_earlier A'|, summed over entries. Its (sub)gradient
    is added to the reduced one before norm and clip.

    Cost: per step, the newest A factors are gathered on every rank.
    Source: O-LoRA (Wang et al., arXiv 2310.14152); lambda_2 = 0.
    """

    changes_gradient = True
    scalable = "every"

    def adapter_names(self, num_tasks: int) -> list[str]:
        return [f"task{index:02d}" for index in range(num_tasks)]

    def begin_task(self, model: nn.Module, context: TaskContext) -> None:
        from peft import PeftModel

        assert isinstance(model, PeftModel)
        names = self.adapter_names(context.num_tasks)[: context.index + 1]

        # Earlier adapters stay active, as part of the forward, but only the newest trains.
        model.base_model.set_adapter(names)
        for name, param in model.named_parameters():
            param.requires_grad_(f".{names[-1]}." in name and ".lora_" in name)

    def engine_callback(self, context: TaskContext) -> EngineCallback | None:
        if not context.index or self.settings.o_lora_lambda == 0:
            return None
        return _Orthogonality(self.adapter_names(context.num_tasks)[: context.index + 1], self.settings.o_lora_lambda)


class _Orthogonality(EngineCallback):
    """Adds the penalty's gradient to the reduced gradient of every step."""

    def __init__(self, names: list[str], weight: float) -> None:
        super().__init__()
        self.earlier, self.newest, self.weight = names[:-1], names[-1], weight

    def begin(self, engine: Any) -> None:
        self.term = GradientTerm(engine)
        params = dict(engine.module.named_parameters())
        suffix = f".lora_A.{self.newest}.weight"
        self.shapes: dict[str, torch.Size] = {}
        self.fixed: dict[str, Tensor] = {}
        for name in (name for name in params if name.endswith(suffix)):
            self.shapes[name] = torch.Size(full_shape(params[name]))

            # Earlier factors do not change any more, so they are gathered once.
            old = [params[name.replace(f".{self.newest}.", f".{other}.")] for other in self.earlier]
            whole = [read_whole(a, engine.device).float().reshape(self.shapes[name]) for a in old]
            self.fixed[name] = torch.cat(whole)
        self.remove.append(self.term.install(self._add))

    def _add(self) -> None:
        weights = self.term.weights()
        whole = self._whole(weights)
        term = {}
        for name, fixed in self.fixed.items():
            if name in weights:
                # The gradient of the whole factor, of which this rank keeps its own range.
                start, own = weights[name]
                gradient = orthogonality_gradient(self.weight, fixed, whole[name].to(fixed.device)).reshape(-1)
                term[name] = start, gradient[start : start + own.numel()]
        self.term.add_(term)

    def _whole(self, weights: dict[str, tuple[int, Tensor]]) -> dict[str, Tensor]:
        """Return the newest A factors, whole, fp32, on every rank. A collective."""
        # Each rank adds what it holds to zeros.
        sizes = [shape.numel() for shape in self.shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=collective_device())
        for name, part in zip(self.shapes, flat.split(sizes), strict=True):
            if name in weights:
                start, own = weights[name]
                part[start : start + own.numel()] = own
        if not self.term.replicated:
            dist.all_reduce(flat)
        parts = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}


def orthogonality_gradient(weight: float, fixed: Tensor, newest: Tensor) -> Tensor:
    """Return the gradient in `newest` of weight * sum of |fixed newest'|.

    Args:
        weight: of the penalty.
        fixed: [earlier tasks * r, in].
        newest: [r, in].
    """
    return weight * torch.sign(fixed @ newest.T).T @ fixed
