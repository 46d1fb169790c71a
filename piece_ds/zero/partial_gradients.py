"""Handle parameters whose gradient one backward hands over in several parts.

autograd finishes the gradient of a parameter once in a backward, with all of its uses in it. Reentrant checkpointing
runs a backward of its own inside, for every block that it wraps. A parameter that several blocks use (a module called
twice, layers that share a weight) is then "finished" once for every block. Code that takes the first part for the whole
gradient would be silently wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piece_ds.runtime.distributed import all_reduce_max_, collective_device
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.overriding import override
from piece_ds.zero.supported import adapter_for
from piece_ds.zero.undisturbed import undisturbed

# autograd functions of these packages run no backward inside.
_KNOWN = ("deepspeed.runtime.zero", "deepspeed.sequence.layer", "piece_ds.")

# Layers of these packages checkpoint activations only if `gradient_checkpointing` says so.
_OF_LAYERS = ("torch.", "transformers.", "peft.", "piece_ds.")


def may_come_in_parts(loss: Tensor) -> bool:
    """Return whether a backward from loss runs Python code that may run another backward inside. A collective.

    Cost: a walk over the graph of one micro-batch, and an all-reduce of one number.
    """
    # Look for a custom autograd function that is not known to be harmless.
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    found = False
    while waiting and not found:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        found = function is not None and not function.__module__.startswith(_KNOWN)
        waiting += [following for following, _ in node.next_functions]

    # Ranks may have taken different paths through the model; all of them must decide alike.
    flag = torch.tensor(int(found), dtype=torch.int32, device=collective_device())
    return bool(all_reduce_max_(flag))


def largest_counts(counts: dict[str, int]) -> dict[str, int]:
    """Return every name's largest count over the ranks, whose names are the same. A collective."""
    numbers = torch.tensor([*counts.values()], dtype=torch.int32, device=collective_device())
    return dict(zip(counts, all_reduce_max_(numbers).tolist(), strict=True))


def refuse_parts(engine: Any) -> Callable[[], None]:
    """Raise UserError inside the backward if a gradient is finished twice in it; return undo.

    For steps whose gradients DeepSpeed reduces. At stages 1 to 3 it takes the first part for the whole, and fails with
    an assertion at the second. At stage 0 parts are added, so nothing is refused.
    """
    if engine.zero_optimization_stage() == 0:
        return lambda: None

    # Names seen since the backward began.
    seen: set[str] = set()
    model, backward = engine.module, engine.backward

    def forgetting_backward(*args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return backward(*args, **kwargs)

    def watch(name: str, param: torch.nn.Parameter) -> Callable[[Tensor], None]:
        def finished(_: Tensor) -> None:
            # DeepSpeed's tiles say of every part but the last that more will come, and DeepSpeed waits for it.
            if not getattr(param, "ds_grad_is_ready", True):
                return
            if name in seen:
                raise UserError(came_in_parts(name))
            seen.add(name)

        return finished

    # Before DeepSpeed's own hooks, which run after a gradient has been accumulated.
    handles = [
        param.register_hook(watch(name, param)) for name, param in model.named_parameters() if param.requires_grad
    ]
    # A loop may call backward() of the loss itself, or run two forwards before two backwards.
    handles.append(model.register_forward_pre_hook(lambda *_: seen.clear()))
    restore_backward = override(engine, "backward", forgetting_backward)

    def undo() -> None:
        restore_backward()
        for handle in handles:
            handle.remove()

    return undo


def refuse_foreseen_parts(engine: Any, loss_of: Callable[[], Tensor]) -> None:
    """Raise UserError if a gradient would come in parts in a step whose gradients DeepSpeed reduces. A collective.

    One micro-batch tells, before any step. The engine is left as it was. At stage 0 parts are added, so nothing is
    refused.

    Args:
        engine: whose steps are to come.
        loss_of: runs a forward on the engine and returns its mean loss. Called in training mode without dropout.
    Cost: nothing, unless the model checkpoints activations or is no class of transformers: then one forward, and one
    backward if that forward may run another backward inside.
    """
    if engine.zero_optimization_stage() == 0 or not _may_hide_backwards(engine.module):
        return

    # Count how often each gradient is finished. It is freed, so that DeepSpeed never sees it.
    params = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    counts = dict.fromkeys(params, 0)

    def counter(name: str) -> Callable[[torch.nn.Parameter], None]:
        def count(param: torch.nn.Parameter) -> None:
            param.grad = None
            counts[name] += bool(getattr(param, "ds_grad_is_ready", True))  # as in refuse_parts()

        return count

    # The backward of a pass that leaves nothing behind.
    adapter = adapter_for(engine)
    with undisturbed(engine), adapter.local_backward():
        loss = loss_of()
        is_suspect = may_come_in_parts(loss)
        if is_suspect:
            handles = [param.register_post_accumulate_grad_hook(counter(name)) for name, param in params.items()]
            try:
                engine.backward(loss * 1.0, scale_wrt_gas=False)
            finally:
                for handle in handles:
                    handle.remove()
    if not is_suspect:  # forward without backward: ZeRO-3 may still hold gathered weights
        adapter.abandon_backward()
        return
    adapter.forget_backward()
    found = next((name for name, count in largest_counts(counts).items() if count > 1), None)
    if found is not None:
        raise UserError(came_in_parts(found))


def _may_hide_backwards(model: torch.nn.Module) -> bool:
    """Return whether model checkpoints activations, or is of a library that is not known not to."""
    return any(
        getattr(module, "gradient_checkpointing", False) or not type(module).__module__.startswith(_OF_LAYERS)
        for module in model.modules()
    )


def came_in_forward(name: str) -> str:
    """Return the message that refuses the parameter of that name, whose gradient came before backward had begun."""
    return (
        f"the gradient of {name!r} is formed in forward, as DeepSpeed's TiledFusedLogitsLoss does, where no factor on "
        "the loss reaches it: compute the loss with sequence_tiled_compute(), or whole"
    )


def came_in_parts(name: str) -> str:
    """Return the message that refuses the parameter of that name."""
    return (
        f"the gradient of {name!r} comes in several parts, as reentrant checkpointing of blocks that share a weight "
        "makes it: use non-reentrant checkpointing (--gradient_checkpointing_kwargs '{\"use_reentrant\": false}')"
    )
