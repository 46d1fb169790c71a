"""launch/eval_tasks.py: loss and accuracy of a model on tasks, under any ZeRO stage and number of ranks."""

from typing import Any

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.command import with_default_config
from piece_ds.distributed import barrier, is_main
from piece_ds.engines import inference_model
from piece_ds.errors import UserError
from piece_ds.files import write_json
from piece_ds.flags import default_flags
from piece_ds.inputs import load_inputs
from piece_ds.judge import Scores, judge
from piece_ds.model import load_model
from piece_ds.run_folder import versions


def main(argv: list[str]) -> None:
    """The whole job of launch/eval_tasks.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    scores = evaluate(parse(with_default_config(argv), default_flags(argv)))
    if is_main():
        for task, loss in scores.loss.items():
            accuracy = scores.accuracy[task]
            print(f"{task}: loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2%}"))
        if scores.general_loss is not None:
            print(f"general text: loss {scores.general_loss:.4f}")


def evaluate(settings: Settings) -> Scores:
    """Judge the model and write --output_file.

    Raises:
        UserError: settings or data that cannot be used; nothing has been written then.
    """
    output_file = settings.output.output_file
    if output_file is None or not (settings.data.task_dir or settings.data.train_file):
        raise UserError("eval_tasks.py needs --task_dir D with --tasks A,B, and --output_file F")
    if settings.model.model_name_or_path is None:
        raise UserError("eval_tasks.py needs --model_name_or_path M")
    inputs = load_inputs(settings)
    settings, arguments = inputs.settings, inputs.arguments
    model: Any = inference_model(load_model(settings.model, inputs.dtype), arguments)
    scores = judge(
        model,
        inputs.tokenizer,
        inputs.tasks,
        inputs.general,
        arguments.per_device_eval_batch_size,
        settings.data.max_new_tokens,
        arguments.device,
    )
    if is_main():
        content = {"loss": scores.loss, "accuracy": scores.accuracy, "general_loss": scores.general_loss}
        write_json(output_file, {**content, "settings": settings.shown(), "versions": versions()})
    barrier()
    if hasattr(model, "empty_partition_cache"):
        model.empty_partition_cache()
        model.destroy()
    return scores
