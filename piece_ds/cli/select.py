"""launch/select_mask.py: only importance and selection, from a model and a data file to a mask file."""

from pathlib import Path

from piece_ds.checkpoint.mask_base import with_base
from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.config.piece import split_patterns
from piece_ds.config.settings import Settings, load_settings, print_help
from piece_ds.data.collate import pad_id
from piece_ds.data.image_collate import make_collator
from piece_ds.data.packing import training_collator
from piece_ds.evaluation.chunked_loss import install_chunked_loss
from piece_ds.evaluation.padding import answer_tokens, check_rows
from piece_ds.methods.registry import methods_help
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible, load_model, reads_images
from piece_ds.models.processor import tokenizer_of
from piece_ds.preflight.preflight import SELECT, preflight
from piece_ds.runtime.distributed import is_main
from piece_ds.state.mask import Mask
from piece_ds.training.engines import statistics_engine
from piece_ds.training.general_statistics import general_statistics_of
from piece_ds.training.mask_source import MaskSource
from piece_ds.training.progress import proposal


def main(argv: list[str]) -> None:
    """Run launch/select_mask.py."""
    if "-h" in argv or "--help" in argv:
        print_help({"method": methods_help()})
        return
    mask = select_mask(load_settings(argv))
    if is_main():
        print(f"{mask.num_selected} of {mask.layout.total} elements selected ({mask.method}){proposal(mask)}")


def select_mask(settings: Settings) -> Mask:
    """Estimate importance, select, and write --output_file.

    Raises:
        UserError: settings or data cannot be used. Nothing has been written by then.
    """

    # Check settings and data, then load the model with only eligible parameters left to train.
    inputs = preflight(settings, SELECT)
    settings, arguments, task, output_file = inputs.settings, inputs.arguments, inputs.tasks[0], inputs.output_file
    model = load_model(settings.model, inputs.dtype)
    freeze_ineligible(
        model, patterns=split_patterns(settings.model.eligible), excluded=split_patterns(settings.model.exclude)
    )
    install_chunked_loss(model, settings.model.loss_chunk_tokens)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)

    # An engine without an optimizer is enough for gradients.
    engine = statistics_engine(model, arguments)
    if not reads_images(inputs.config) and not settings.data.packing:
        # One row per micro-batch is never padded.
        one_row_at_a_time = settings.method.importance_batch_size == 1
        padding = pad_id(tokenizer_of(inputs.tokenizer))
        check_rows(engine, answer_tokens(task.train), padding, one_row_at_a_time)

    # Methods that need the base model's statistics of general text get them first.
    folder, collate = Path(f"{inputs.output_file}.general_statistics"), make_collator(inputs.tokenizer)
    general = general_statistics_of(settings.method, inputs.general_importance, collate, folder, True)
    source = MaskSource(
        config=settings.method.config(arguments.seed, settings.model.exclude),
        files=settings.method,
        task=task.name,
        general=general,
    )

    # Estimate, select and write.
    batches = source.batches(task.train, training_collator(inputs.tokenizer, settings.data.packing))
    mask = with_base(source.estimate(engine, batches, layout_of(engine.module)), engine.module)
    save_mask(output_file, mask)
    engine.empty_partition_cache()
    engine.destroy()
    return mask
