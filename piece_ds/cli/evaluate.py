"""launch/eval_tasks.py: loss and scores of a model on tasks, under any ZeRO stage and number of ranks."""

from pathlib import Path
from typing import Any

from piece_ds.config.defaults import default_flags, with_default_config
from piece_ds.config.parsing import Settings, parse, print_help
from piece_ds.data.collate import pad_id
from piece_ds.evaluation.evaluate import EvalResult, evaluate_tasks
from piece_ds.evaluation.matrix import ACCURACY
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.models.loading import load_model, reads_images
from piece_ds.models.processor import tokenizer_of
from piece_ds.preflight.inputs import load_inputs
from piece_ds.preflight.rank_consistency import require_rank_consistency
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.versions import versions
from piece_ds.training.engines import inference_model


def main(argv: list[str]) -> None:
    """The whole job of launch/eval_tasks.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    scores, metrics = evaluate(parse(with_default_config(argv), default_flags(argv)))
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
    """Judge the model and write --output_file, and what the model wrote to a folder beside it, NAME-predictions.

    Returns:
        The scores, and for each task what its score is.

    Raises:
        UserError: settings or data that cannot be used; nothing has been written then.
    """
    output_file = settings.output.output_file
    if output_file is None or not (settings.data.task_dir or settings.data.train_file):
        raise UserError("eval_tasks.py needs --task_dir D with --tasks A,B, and --output_file F")
    if settings.model.model_name_or_path is None:
        raise UserError("eval_tasks.py needs --model_name_or_path M")
    inputs = load_inputs(settings)
    require_rank_consistency(inputs)
    settings, arguments = inputs.settings, inputs.arguments
    model: Any = inference_model(load_model(settings.model, inputs.dtype), arguments)
    if not reads_images(inputs.config):
        padding = pad_id(tokenizer_of(inputs.tokenizer))
        check_rows(model, answer_tokens(inputs.tasks[0].test), padding, arguments.per_device_eval_batch_size == 1)
    scores = evaluate_tasks(
        model,
        inputs.tokenizer,
        inputs.tasks,
        inputs.scorers,
        inputs.general,
        arguments.per_device_eval_batch_size,
        settings,
        arguments.device,
        Path(output_file).with_name(f"{Path(output_file).stem}-predictions"),
    )
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
    if hasattr(model, "empty_partition_cache"):
        model.empty_partition_cache()
        model.destroy()
    return scores, metrics
