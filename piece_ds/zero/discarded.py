"""Notice when a loop throws its gradients away, for gradients that DeepSpeed does not hold."""

from collections.abc import Callable
from typing import Any

from piece_ds.runtime.overriding import override


def on_discard(engine: Any, discard: Callable[[], None]) -> Callable[[], None]:
    """Call discard() wherever zero_grad() would throw away gradients that DeepSpeed itself holds; return undo.

    The optimizer's always does. The engine's only clears `grad`. At stage 0 that is all there is, while at stages 1 to
    3 the sums of earlier micro-batches lie elsewhere and stay. So there it counts only as long as no micro-batch of
    the step is complete, as after an error in its first backward.
    """
    optimizer, of_engine, of_optimizer = engine.optimizer, engine.zero_grad, engine.optimizer.zero_grad

    def engine_zero_grad(*args: Any, **kwargs: Any) -> None:
        of_engine(*args, **kwargs)
        if not engine.zero_optimization() or engine.micro_steps % engine.gradient_accumulation_steps() == 0:
            discard()

    def optimizer_zero_grad(*args: Any, **kwargs: Any) -> None:
        of_optimizer(*args, **kwargs)
        discard()

    restore = [
        override(engine, "zero_grad", engine_zero_grad),
        override(optimizer, "zero_grad", optimizer_zero_grad),
    ]

    def undo() -> None:
        for function in restore:
            function()

    return undo
