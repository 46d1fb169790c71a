"""Read the rows of --general_text, from a file, from the Python installation, or written by the base model itself."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from piece_ds.config.settings import Settings
from piece_ds.data.general_rows import load_general
from piece_ds.data.general_text import BUILTIN, NUM_JUDGED, SELF, builtin_rows, hold_out_judged
from piece_ds.data.tokenize import Encoder
from piece_ds.evaluation.kept_logits import num_answer_tokens
from piece_ds.evaluation.self_written import SelfWriting, self_written_file
from piece_ds.models.fingerprint import model_digest
from piece_ds.models.loading import empty_model, load_model, reads_images
from piece_ds.models.pretrained import model_source
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.preflight.general_flags import needing_general_text
from piece_ds.runtime.errors import UserError

# The same for every run on a base model, so that they share what is kept of it.
SEED = 0
BUILTIN_ROWS, BUILTIN_TOKENS = 128, 96
# Each rank writes with the whole model: partitioned, every token would gather it.
MAX_WHOLE_BYTES = 20e9


def read_general_text(settings: Settings, processing: Processing) -> datasets.Dataset | None:
    """Return the encoded rows of --general_text if a file or the Python installation has them, else None.

    Args:
        settings: of the run.
        processing: the model's tokenizer or processor.
    Raises:
        UserError: the file cannot be used.
        MachineError: this Python installation carries too little prose.
    """
    named, data = settings.data.general_text, settings.data
    if named in (None, SELF):
        return None
    if named == BUILTIN:
        encoder = Encoder(tokenizer_of(processing), data.cutoff)
        return builtin_rows(encoder, BUILTIN_ROWS, min(BUILTIN_TOKENS, data.cutoff), SEED)
    return load_general(str(named), processing, data.cutoff, images=data)


def write_general_text(settings: Settings, processing: Processing, dtype: torch.dtype) -> datasets.Dataset | None:
    """Return the encoded rows that the base model writes for --general_text self; None without it. A collective.

    Args:
        settings, processing: as in read_general_text().
        dtype: to load the model in.
    Raises:
        UserError: the model's files are not on this machine.
    Cost: once per base model, see write_rows().
    """
    if settings.data.general_text != SELF:
        return None

    # Text is kept by the model's weights: without a digest, another model's could be taken for it.
    digest = model_digest(model_source(str(settings.model.model_name_or_path)))
    if digest is None:
        raise UserError(
            f"--general_text self: the weights of {settings.model.model_name_or_path} are not in files here, so the "
            "text could not be told from another model's; give a model folder"
        )
    device = get_accelerator().current_device_name()

    def open_model() -> nn.Module:
        return load_model(settings.model, dtype, whole=True).to(device).eval()

    path = self_written_file(digest, open_model, tokenizer_of(processing), SelfWriting(seed=SEED), device)
    return load_general(str(path), processing, settings.data.cutoff)


def check_general_text(settings: Settings, config: Any) -> None:
    """Raise UserError if the model cannot write text of its own, before anything is read."""
    if settings.data.general_text != SELF:
        return
    source = settings.model.model_name_or_path
    if reads_images(config):
        raise UserError(f"--general_text self: {source} reads images; give builtin or a file")

    # From the configuration: no weight is read.
    size = sum(parameter.numel() * parameter.element_size() for parameter in empty_model(config).parameters())
    if size > MAX_WHOLE_BYTES:
        raise UserError(
            f"--general_text self: {source} has {size / 1e9:.0f} GB of weights, and each rank would load all of them "
            f"to write with (limit {MAX_WHOLE_BYTES / 1e9:.0f} GB); give builtin or a file"
        )


def judged_apart(
    settings: Settings, general: datasets.Dataset | None, general_text: datasets.Dataset | None
) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
    """Return (rows of --general_text to use, rows that --forgetting_budget judges on).

    No row is both: what was trained on, or decided what may move, says nothing of other text.

    Args:
        settings: of the run.
        general: rows of --general_file, or None.
        general_text: rows of --general_text, or None.
    Raises:
        UserError: there are too few rows.
    """
    if settings.method.forgetting_budget is None:
        return general_text, None

    # Rows of their own, or text that nothing else uses, or a part that is held out.
    judged = general if general is not None else general_text
    if general is None and general_text is not None and needing_general_text(settings):
        general_text, judged = hold_out_judged(general_text)
    if judged is None or len(judged) < NUM_JUDGED:
        raise UserError("--forgetting_budget needs two rows of general text or more: it searches on every second one")
    return general_text, judged


def check_base_logits(settings: Settings, config: Any, rows: datasets.Dataset | None, dtype: torch.dtype) -> None:
    """Raise UserError if --general_kl has no room on the disk for the base model's logits, or cannot have them.

    Args:
        settings, config: of the run and the model.
        rows: of --general_text, or None.
        dtype: of the model.
    """
    if not settings.method.general_kl or rows is None:
        return
    source = settings.model.model_name_or_path
    if reads_images(config):
        raise UserError(f"--general_kl: {source} reads images, whose logits are not kept: use --general_replay")

    # The file lies where the run does.
    vocabulary = config.get_text_config().vocab_size
    size = sum(num_answer_tokens(rows)) * vocabulary * dtype.itemsize
    place = Path(settings.flag("output_dir") or ".").absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if size > free:
        raise UserError(
            f"--general_kl keeps the base model's logits of {len(rows)} rows of general text, {size / 1e9:.1f} GB of "
            f"{vocabulary} words a token, and --output_dir {place} has {free / 1e9:.1f} GB free: give fewer rows"
        )
