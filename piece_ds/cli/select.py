"""launch/select_mask.py: importance and selection alone, from a model and a data file to a mask file."""

from pathlib import Path

from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.config.defaults import default_flags, with_default_config
from piece_ds.config.parsing import Settings, parse, print_help
from piece_ds.data.collate import MicroBatches, pad_id
from piece_ds.data.image_collate import make_collator
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.methods.registry import BASELINES, SELECTIONS
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible, load_model, patterns_of, reads_images
from piece_ds.models.processor import tokenizer_of
from piece_ds.preflight.checks import check_kernels, check_method, check_sources
from piece_ds.preflight.inputs import load_inputs
from piece_ds.preflight.rank_consistency import require_rank_consistency
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.selection.estimators import estimator_names
from piece_ds.state.mask import Mask
from piece_ds.training.engines import statistics_engine
from piece_ds.training.mask_source import MaskSource


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
    method = settings.method.method
    check_method(method)
    if method in BASELINES:
        raise UserError(
            f"--method {method} has no mask; select_mask.py expects one of "
            f"{', '.join([*estimator_names(), *SELECTIONS])}"
        )
    output_file = settings.output.output_file
    if output_file is None or settings.data.train_file is None:
        raise UserError("select_mask.py needs --train_file F and --output_file MASK")
    if settings.model.model_name_or_path is None:
        raise UserError("select_mask.py needs --model_name_or_path M")
    inputs = load_inputs(settings)
    require_rank_consistency(inputs)
    settings, arguments, task = inputs.settings, inputs.arguments, inputs.tasks[0]
    check_sources(settings, num_tasks=1)
    check_kernels(settings.method.method, arguments)
    model = load_model(settings.model, inputs.dtype)
    freeze_ineligible(model, patterns=patterns_of(settings.model))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    engine = statistics_engine(model, arguments)
    if not reads_images(inputs.config):
        one_row_at_a_time = settings.method.importance_batch_size == 1
        padding = pad_id(tokenizer_of(inputs.tokenizer))
        check_rows(engine, answer_tokens(task.train), padding, one_row_at_a_time)
    batches = MicroBatches(task.train, make_collator(inputs.tokenizer), settings.method.importance_batch_size)
    general = Path(settings.method.general_statistics or f"{output_file}.general_statistics")
    source = MaskSource(
        settings.method, task.name, arguments.seed, general=inputs.general_importance, general_folder=general
    )
    mask = source.estimate(engine, batches, layout_of(engine.module))
    save_mask(output_file, mask)
    engine.empty_partition_cache()
    engine.destroy()
    return mask
