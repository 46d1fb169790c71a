"""Refuse flags about general text that lack it, ignore it, or cannot be carried out."""

from piece_ds.config.piece import PieceConfig
from piece_ds.config.settings import Settings
from piece_ds.methods.registry import find_method
from piece_ds.runtime.errors import UserError


def check_general_flags(settings: Settings, num_tasks: int) -> None:
    """Raise UserError if a flag lacks general text, or general text is given to nothing.

    Args:
        settings: of the run.
        num_tasks: of the stream.
    """
    flags, data, method = settings.method, settings.data, find_method(settings.method.method)
    needing, has_budget = needing_general_text(settings), flags.forgetting_budget is not None

    # What flags need.
    if needing and not data.general_text:
        raise UserError(
            f"{needing[0]} needs text that stands for general ability: --general_text self, builtin or a file"
        )
    if has_budget and not (data.general_file or data.general_text):
        raise UserError(
            "--forgetting_budget needs text that stands for general ability: --general_file or --general_text"
        )

    # What methods cannot do.
    scalable = "every" if method.baseline is None else method.baseline.scalable
    if has_budget and (scalable == "none" or (scalable == "first" and num_tasks > 1)):
        raise UserError(
            f"--forgetting_budget cannot scale {'a later task' if scalable == 'first' else 'a task'} of --method "
            f"{method.name}, whose change is not linear in its adapter: use another method"
        )
    if flags.step_scale != "none" and method.baseline is not None and method.baseline.saves_itself:
        raise UserError(
            f"--step_scale {flags.step_scale} has no meaning with --method {method.name}: general text has no "
            "importance for adapters that begin with the task"
        )

    # What would be ignored.
    judges = has_budget and not data.general_file
    if not needing and ((data.general_text and not judges) or flags.general_statistics):
        raise UserError(
            "--general_text and --general_statistics belong to --method piece-ratio, --step_scale general, "
            "--general_replay and --general_kl; --general_text also to --forgetting_budget without --general_file"
        )
    if flags.general_share is not None and not (flags.general_replay or flags.general_kl):
        raise UserError(
            "--general_share belongs to --general_replay and --general_kl: give one of them, or leave it out"
        )
    divides = method.name in ("piece-ratio", "piece-gain", "piece-ratio-activation") or flags.step_scale != "none"
    if flags.damping_quantile != PieceConfig.damping_quantile and not divides:
        raise UserError(
            f"--damping_quantile has no meaning with --method {method.name}: it belongs to piece-ratio, piece-gain, "
            "piece-ratio-activation and --step_scale general"
        )


def needing_general_text(settings: Settings) -> list[str]:
    """Return the flags in use that need text which stands for general ability."""
    flags, method = settings.method, find_method(settings.method.method)
    asked = {
        f"--method {method.name}": method.needs_general_text,
        f"--step_scale {flags.step_scale}": flags.step_scale != "none",
        f"--general_replay {flags.general_replay:g}": flags.general_replay > 0,
        f"--general_kl {flags.general_kl:g}": flags.general_kl > 0,
    }
    return [flag for flag, needs in asked.items() if needs]
