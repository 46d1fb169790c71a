"""The work of `piece_ds plan`: from a model's shapes to tables of memory and traffic."""

import argparse
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from piece_ds.config.arguments import ModelArguments
from piece_ds.config.recommended import HELP
from piece_ds.models.loading import empty_model, load_config
from piece_ds.models.pretrained import PRETRAINED, NotFetched
from piece_ds.models.suitable import check_causal, check_heads, check_kind, quantized_by
from piece_ds.plan.cards import CARDS, YES, card_verdicts
from piece_ds.plan.memory import MOMENTS, Term, memory_terms, peak, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import KNOWN, ModelShape, known_config, shape_of
from piece_ds.plan.traffic import transfers
from piece_ds.report.grids import Grid
from piece_ds.report.table import print_grids
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.runtime.text import printable

TABLE_RANKS = (1, 8, 64, 512)
TABLE_MODES = ("full", "lora", "masked", "compact")
GB = 1e9


def plan(arguments: argparse.Namespace) -> None:
    """Print the plan of one setting, or the table."""
    setting = Setting(**{field.name: getattr(arguments, field.name) for field in fields(Setting)})
    if arguments.table:
        print("\n".join(markdown_table(setting, [arguments.model] if arguments.model else list(KNOWN))))
        return
    if arguments.model is None:
        raise UserError(f"plan needs --model ({_expected()}) or --table")
    config, shape = _open(arguments.model)

    print(printable(f"{arguments.model}: {shape.total} parameters{_of_experts(shape)}"))
    method = quantized_by(config)
    if method is not None:
        print(
            f"its files are quantized ({printable(method)}), which training refuses: the plan is of a dequantized copy"
        )
    print(_setting_line(shape, setting))
    print(_verdict_line(shape, setting))
    faster = _faster_line(shape, setting)
    print(f"{faster}\n" if faster else "")
    print_grids(
        [
            _cards_grid(shape, setting),
            _memory_grid(memory_terms(shape, setting)),
            _sums_grid(memory_terms(shape, setting)),
            *([_traffic_grid(shape, setting)] if setting.world > 1 else []),
        ]
    )
    print(f"\n{HELP}")


def markdown_table(setting: Setting, models: list[str]) -> Iterator[str]:
    """Yield the lines of a table of models, ranks and update modes: GB per rank at the peak, and GB received per step.

    Estimates are left out: activations, gathered parameters and exchange buffers come on top.
    """
    yield f"GB (1e9 bytes) of a rank, ZeRO-{setting.zero}, {setting.dtype}, ratio {setting.ratio:g}, {setting.method}:"
    yield "training / selection; traffic is what one rank receives in one optimizer step."
    yield ""
    yield f"| model | ranks | {' | '.join(TABLE_MODES)} | traffic {' | traffic '.join(TABLE_MODES[2:])} |"
    yield f"|---{'|---:' * (1 + len(TABLE_MODES) + len(TABLE_MODES[2:]))}|"
    for model in models:
        shape = _shape(model)
        for world in TABLE_RANKS:
            # All modes side by side, everything else equal.
            settings = [replace(setting, world=world, update_mode=mode) for mode in TABLE_MODES]
            memory = [_training_and_selection(memory_terms(shape, s)) for s in settings]
            traffic = [f"{_step_traffic(shape, s) / GB:.2f}" for s in settings[2:]]
            yield f"| {model} | {world} | {' | '.join([*memory, *traffic])} |"


def _training_and_selection(terms: list[Term]) -> str:
    sums = [term for term in terms if not term.is_estimate]
    training = max(total(sums, moment) for moment in MOMENTS[1:])
    # Full fine-tuning and LoRA have no selection to pay for.
    selects = any(term.name == "statistics" for term in terms)
    return f"{training / GB:.2f}" + (f" / {total(sums, MOMENTS[0]) / GB:.2f}" if selects else "")


def _step_traffic(shape: ModelShape, setting: Setting) -> float:
    return sum(t.received for t in transfers(shape, setting) if t.collective != "all-to-all")


def _expected() -> str:
    return f"a model folder, its config.json, a Hub id, or one of {', '.join([*KNOWN, *PRETRAINED])}"


def _shape(name: str) -> ModelShape:
    return _open(name)[1]


def _open(name: str) -> tuple[Any, ModelShape]:
    """Return configuration and shape of a model by its name. Only a configuration is read, or fetched from the Hub."""
    if name in KNOWN:
        return known_config(name), shape_of(empty_model(known_config(name)))
    try:
        config = load_config(ModelArguments(model_name_or_path=name))
        check_kind(f"--model_name_or_path {name}", config)
        model = empty_model(config)
        check_causal(f"--model_name_or_path {name}", config, model)
        check_heads(f"--model_name_or_path {name}", model)
        return config, shape_of(model)
    except NotFetched:
        raise
    except Exception as error:
        # A configuration is data from outside. Whatever transformers or torch raise while they read it or build the
        # model from it means that it describes no model.
        reason = " ".join(str(error).removeprefix(f"--model_name_or_path {name}: ").split())
        hint = nearest(name, [*KNOWN, *PRETRAINED])
        raise UserError(f"--model {name}: expected {_expected()}; {reason[:300]}.{hint}") from error


def _of_experts(shape: ModelShape) -> str:
    """Return what a token uses of a mixture of experts, in words; nothing for other models."""
    if shape.experts is None:
        return ""
    return f", {shape.active} active for a token ({shape.experts.per_token} of {shape.experts.number} experts a layer)"


def _setting_line(shape: ModelShape, setting: Setting) -> str:
    """Return what is planned, in words."""
    selects = setting.selected(shape)
    parts = [
        f"{setting.world} rank{'s' * (setting.world > 1)}",
        f"ZeRO-{setting.zero}",
        setting.dtype,
        f"update_mode {setting.update_mode}",
        *([f"{selects} selected ({100 * setting.ratio:g} %, {setting.method})"] if selects else []),
        *(["optimizer on the CPU"] if setting.offload_optimizer else []),
        *(["parameters on the CPU"] if setting.offload_param else []),
        f"{setting.tokens} tokens x {setting.accumulation} a step and rank",
        *([f"{setting.general_tokens} of general text beside each"] if setting.general_tokens else []),
    ]
    return ", ".join(parts)


def _verdict_line(shape: ModelShape, setting: Setting) -> str:
    """Return the smallest card that fits the plan, and what the plan needs."""
    most, moment = peak(memory_terms(shape, setting))
    need = f"needs {most / GB:.2f} GB of a device at most ({moment}, with estimates)"
    card = next((found.gigabytes for found in card_verdicts(shape, setting) if found.fits == YES), None)
    verdict = f"fits {card} GB cards" if card else f"fits no card of up to {max(CARDS)} GB"
    return f"{verdict}: {need}"


def _faster_line(shape: ModelShape, setting: Setting) -> str:
    """Return from which card on a stage below 3 fits as well; '' if setting has another stage or none does."""
    if setting.zero != 3:
        return ""
    # Compact mode gathers whole layers, which costs little beside long rows.
    measured = "6.6 times LoRA's step at 512 tokens"
    if setting.update_mode == "compact":
        measured = "1.9 times the step at 512 tokens, 1.02 times at 4096"
    for found in card_verdicts(shape, setting):
        if found.lowest_stage is not None and found.lowest_stage < 3:
            return (
                f"From {found.gigabytes} GB cards on ZeRO-{found.lowest_stage} fits too and is faster: ZeRO-3 fetches "
                f"and frees every parameter in every forward and backward pass (8B on one H200: {measured})."
            )
    return ""


def _cards_grid(shape: ModelShape, setting: Setting) -> Grid:
    rows = []
    for found in card_verdicts(shape, setting):
        lowest = "none" if found.lowest_stage is None else f"ZeRO-{found.lowest_stage}"
        if found.lowest_stage is None and found.lowest_stage_offloaded is not None:
            lowest = f"ZeRO-{found.lowest_stage_offloaded} with --offload_optimizer"
        name = f"{found.gigabytes} GB ({CARDS[found.gigabytes]})"
        rows.append((name, found.fits, lowest, f"{found.usable_bytes / GB:.1f}"))
    header = ("card", f"fits at ZeRO-{setting.zero}", "lowest stage that fits", "usable GB")
    return Grid("cards (perhaps: fits without what is only estimated)", header, tuple(rows), num_text_columns=3)


def _memory_grid(terms: list[Term]) -> Grid:
    rows = [
        (
            term.name + (" (estimate)" if term.is_estimate else ""),
            term.formula,
            "CPU" if term.on_host else "device",
            "always" if term.moments == MOMENTS else ", ".join(term.moments),
            f"{term.size / GB:.3f}",
        )
        for term in terms
    ]
    return Grid("memory of a rank", ("what", "formula", "where", "when", "GB"), tuple(rows), num_text_columns=4)


def _sums_grid(terms: list[Term]) -> Grid:
    sums = [term for term in terms if not term.is_estimate]
    rows = []
    for name, chosen, on_host in (
        ("device, without estimates", sums, False),
        ("device", terms, False),
        ("CPU", terms, True),
    ):
        sizes = [f"{total(chosen, moment, on_host) / GB:.3f}" for moment in MOMENTS]
        rows.append((name, *sizes, f"{peak(chosen, on_host)[0] / GB:.3f}"))
    return Grid("sums, in GB", ("", *MOMENTS, "most"), tuple(rows))


def _traffic_grid(shape: ModelShape, setting: Setting) -> Grid:
    rows = [(t.name, t.collective, f"{t.elements:.4g}", f"{t.received / GB:.3f}") for t in transfers(shape, setting)]
    header = ("what", "collective", "elements", "GB received")
    return Grid("traffic of an optimizer step and rank", header, tuple(rows), num_text_columns=2)
