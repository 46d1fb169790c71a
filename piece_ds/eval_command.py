"""launch/eval_tasks.py: loss and accuracy of a model on tasks, under any ZeRO stage and number of ranks."""

from typing import Any

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.checks import check_deepspeed_file
from piece_ds.command import start_distributed, with_default_config
from piece_ds.distributed import barrier, is_main
from piece_ds.engines import inference_model
from piece_ds.errors import UserError
from piece_ds.files import write_json
from piece_ds.flags import default_flags, with_precision
from piece_ds.judge import Scores, judge
from piece_ds.model import dtype_of, load_config, load_model, load_tokenizer, require_weights
from piece_ds.run_folder import versions
from piece_ds.stream import load_general, load_task_stream


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
    check_deepspeed_file(settings.flag("deepspeed"))
    config = load_config(settings.model)
    require_weights(settings.model)
    tokenizer = load_tokenizer(settings.model)
    tasks = load_task_stream(settings.data, tokenizer)
    general = None
    if settings.data.general_file:
        general = load_general(settings.data.general_file, tokenizer, settings.data.cutoff,
                               max_rows=settings.data.max_eval_samples)  # fmt: skip
    start_distributed()
    settings, dtype = with_precision(settings, dtype_of(settings.model, config))
    arguments = settings.training_arguments()
    model: Any = inference_model(load_model(settings.model, dtype), arguments)
    scores = judge(
        model,
        tokenizer,
        tasks,
        general,
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
