"""launch/eval_tasks.py: loss and scores of a model on tasks, at any ZeRO stage and number of ranks."""

from typing import Any

from piece_ds.config.settings import Settings, load_settings, print_help
from piece_ds.data.collate import pad_id
from piece_ds.evaluation.chunked_loss import install_chunked_loss
from piece_ds.evaluation.evaluate import EvalResult, evaluate_tasks
from piece_ds.evaluation.matrix import ACCURACY
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.methods.registry import methods_help
from piece_ds.models.loading import load_model, reads_images
from piece_ds.models.processor import tokenizer_of
from piece_ds.preflight.preflight import EVALUATE, preflight
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.files import write_json
from piece_ds.runtime.versions import versions
from piece_ds.training.engines import inference_model


def main(argv: list[str]) -> None:
    """Run launch/eval_tasks.py."""
    if "-h" in argv or "--help" in argv:
        print_help({"method": methods_help()})
        return
    scores, metrics = evaluate(load_settings(argv))
    if is_main():
        for task, loss in scores.loss.items():
            score = scores.score[task]
            shown = {} if score is None else {metrics[task]: score, **scores.measures.get(task, {})}
            print(", ".join([f"{task}: loss {loss:.4f}", *(f"{name} {value:.2%}" for name, value in shown.items())]))
        if scores.general_loss is not None:
            print(f"general text: loss {scores.general_loss:.4f}")
        for name, value in scores.ability.items():
            print(f"{name}: {value:.4f}")
        if scores.num_tokens:
            print(f"generated: {scores.num_tokens} tokens, {scores.num_tokens / scores.generate_seconds:.0f} a second")


def evaluate(settings: Settings) -> tuple[EvalResult, dict[str, str]]:
    """Evaluate the model. Write --output_file, and the model's outputs to a folder beside it, NAME-predictions.

    Returns:
        The results, and for each task the name of its score.
    Raises:
        UserError: settings or data cannot be used. Nothing has been written by then.
    """

    # Check settings and data, then load the model.
    inputs = preflight(settings, EVALUATE)
    settings, arguments, output_file = inputs.settings, inputs.arguments, inputs.output_file
    loaded = load_model(settings.model, inputs.dtype)
    install_chunked_loss(loaded, settings.model.loss_chunk_tokens)
    model: Any = inference_model(loaded, arguments)
    if not reads_images(inputs.config):
        padding = pad_id(tokenizer_of(inputs.tokenizer))
        # A model that sees padding or later tokens would give wrong losses without any error.
        check_rows(model, answer_tokens(inputs.tasks[0].test), padding, arguments.per_device_eval_batch_size == 1)

    # Evaluate all tasks.
    scores = evaluate_tasks(
        model,
        inputs.tokenizer,
        inputs.tasks,
        scorers=inputs.scorers,
        general=inputs.general,
        batch_size=arguments.per_device_eval_batch_size,
        settings=settings,
        device=arguments.device,
        folder=output_file.with_name(f"{output_file.stem}-predictions"),
    )

    # Write what was found, on rank 0.
    metrics = {task: get_scorer(name).metric for task, name in inputs.scorers.items()}
    if is_main():
        accuracy = {task: score if metrics[task] == ACCURACY else None for task, score in scores.score.items()}
        content = {
            "loss": scores.loss,
            "score": scores.score,
            "accuracy": accuracy,
            "metrics": metrics,
            "general_loss": scores.general_loss,
            "measures": scores.measures,
            "ability": scores.ability,
            "cost": scores.cost,
        }
        write_json(output_file, {**content, "settings": settings.shown(), "versions": versions()})
    barrier()

    # DeepSpeed keeps gathered parameters until it is told to let them go.
    if hasattr(model, "empty_partition_cache"):
        model.empty_partition_cache()
        model.destroy()
    return scores, metrics
