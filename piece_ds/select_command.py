"""launch/select_mask.py: importance and selection alone, from a model and a data file to a mask file."""

from piece_ds.arguments import Settings, parse, print_help
from piece_ds.checkpoint import save_mask
from piece_ds.checks import check_deepspeed_file
from piece_ds.command import start_distributed, with_default_config
from piece_ds.distributed import is_main
from piece_ds.engines import statistics_engine
from piece_ds.errors import UserError
from piece_ds.estimate import estimate_mask
from piece_ds.flags import default_flags, with_precision
from piece_ds.importance import estimator
from piece_ds.model import dtype_of, freeze_ineligible, load_config, load_model, load_tokenizer, require_weights
from piece_ds.state.mask import Mask
from piece_ds.state.partition import layout_of
from piece_ds.statistics_cache import statistics_of
from piece_ds.stream import MicroBatches, load_task_stream, make_collator


def main(argv: list[str]) -> None:
    """The whole job of launch/select_mask.py."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    mask = select_mask(parse(with_default_config(argv), default_flags(argv)))
    if is_main():
        print(f"{mask.num_selected} of {mask.layout.total} elements selected ({mask.method})")


def select_mask(settings: Settings) -> Mask:
    """Estimate, select and write --output_file.

    Raises:
        UserError: settings or data that cannot be used; nothing has been written then.
    """
    estimator(settings.method.method)
    output_file = settings.output.output_file
    if output_file is None or settings.data.train_file is None:
        raise UserError("select_mask.py needs --train_file F and --output_file MASK")
    if settings.model.model_name_or_path is None:
        raise UserError("select_mask.py needs --model_name_or_path M")
    check_deepspeed_file(settings.flag("deepspeed"))
    config = load_config(settings.model)
    require_weights(settings.model)
    tokenizer = load_tokenizer(settings.model)
    task = load_task_stream(settings.data, tokenizer)[0]
    start_distributed()
    settings, dtype = with_precision(settings, dtype_of(settings.model, config))
    arguments = settings.training_arguments()
    model = load_model(settings.model, dtype)
    freeze_ineligible(model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    engine = statistics_engine(model, arguments)
    method = settings.method
    batches = MicroBatches(task.train, make_collator(tokenizer), method.importance_batch_size)
    device = "cpu" if method.statistics_device == "cpu" else None
    layout = layout_of(engine.module)
    stats = statistics_of(method, task.name, engine, batches, layout, device)
    mask = estimate_mask(
        engine,
        batches,
        method.method,
        method.mask_ratio,
        method.budget,
        method.importance_lambda,
        arguments.seed,
        device,
        layout,
        stats,
    )
    save_mask(output_file, mask)
    engine.empty_partition_cache()
    engine.destroy()
    return mask
