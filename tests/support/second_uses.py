"""Models that use a weight more than once, or outside the layer that holds it, and the gradients plain torch finds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, FalconMambaConfig, PreTrainedConfig, PreTrainedModel, Zamba2Config

WIDTH = 6
CHECKPOINTING = ("", "reentrant", "non-reentrant")


class Uses(nn.Module):
    """Blocks that are run under a way of checkpointing; `use` names what happens to the first block's weight besides.

    Args:
        use: a key of USES.
        checkpointing: one of CHECKPOINTING.
    """

    def __init__(self, use: str, checkpointing: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.use, self.checkpointing = use, checkpointing
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if use == "two layers share it":
            self.blocks[2].weight = self.blocks[0].weight
        if use == "three layers share it":
            self.blocks[1].weight = self.blocks[2].weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self._run(lambda x, block=block: block(x).tanh(), x)
        return USES[self.use](self, x).square().mean()

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.checkpointing:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.checkpointing == "reentrant")

    @property
    def weight(self) -> Tensor:
        return self.blocks[0].weight


USES: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "once": lambda model, x: x,
    "two layers share it": lambda model, x: x,
    "three layers share it": lambda model, x: x,
    "its layer is called again": lambda model, x: model._run(lambda x: model.blocks[0](x).tanh(), x),
    "its layer is called by keyword": lambda model, x: model._run(lambda x: model.blocks[0](input=x).tanh(), x),
    "product": lambda model, x: x @ model.weight,
    "product under checkpointing": lambda model, x: model._run(lambda x: x @ model.weight, x),
    "functional": lambda model, x: functional.linear(x, model.weight.t().contiguous()),
    "penalty": lambda model, x: torch.cat([x.reshape(-1), model.weight.reshape(-1)]),
    "norm of it divides": lambda model, x: x / model.weight.norm(),
    "view of it": lambda model, x: x * model.weight[0].exp(),
}


class NeverCalled(nn.Module):
    """A layer that only holds a weight, as Falcon-Mamba's dt_proj."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.holder = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.holder.weight.t()).tanh().square().mean()


def language_model(family: str, checkpointing: str, vocab_size: int = 31) -> PreTrainedModel:
    """A tiny model of a family of transformers with shared blocks, or weights that are read past their layers."""
    torch.manual_seed(5)
    configs: dict[str, Callable[[], PreTrainedConfig]] = {
        "zamba2": lambda: Zamba2Config(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_mem_blocks=1,
            intermediate_size=24,
            num_attention_heads=2,
            mamba_d_state=4,
            mamba_ngroups=1,
            n_mamba_heads=4,
            mamba_headdim=8,
            use_mem_rope=True,
            chunk_size=8,
            initializer_range=0.2,
        ),
        "falcon_mamba": lambda: FalconMambaConfig(
            vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.2
        ),
    }
    model = AutoModelForCausalLM.from_config(configs[family]()).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model


def plain_gradients(model: nn.Module, backward: Callable[[], None]) -> dict[str, Tensor]:
    """Whole gradients by name, as plain torch leaves them; none are left behind."""
    for param in model.parameters():
        param.requires_grad_(True)
    backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
