"""Name the settings to begin with: recipes that set several flags at once. docs/forgetting.md has the measurements.

A flag or a YAML key wins over a recipe, but for the method: the other values were measured with it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from piece_ds.runtime.errors import UserError, nearest

# General text that the model writes itself, steps scaled by its importance, and divergence from the base model on it.
_KEEPING = {"general_text": "self", "step_scale": "general", "general_kl": 4}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "mask": {"method": "piece-ratio", "mask_ratio": 0.01, **_KEEPING, "learning_rate": 1e-3},
    "wide": {"method": "random", "mask_ratio": 0.1, **_KEEPING, "learning_rate": 1e-3},
    "full": {"method": "seqft", **_KEEPING, "learning_rate": 1e-4},
    "paper": {"method": "piece-s", "mask_ratio": 0.001},
}

# Root mean square of the matrices of SmolLM2-135M, on which the rates were measured.
MEASURED_SIZE = 0.1925

# Names of PieceCallback's arguments that differ from the flags'.
_ARGUMENT_OF = {"mask_ratio": "ratio"}


def flags_in(recipe: str) -> str:
    """Return the flags of a recipe as a command line has them."""
    return " ".join(
        f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
        for name, value in RECIPES[recipe].items()
    )


def settings_of(recipe: str | None) -> Mapping[str, Any]:
    """Return name -> value of the flags that a recipe sets; nothing without a recipe.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe is None:
        return {}
    if recipe not in RECIPES:
        known = f"known: {', '.join(RECIPES)}.{nearest(recipe, list(RECIPES))}"
        raise UserError(f"--recipe {recipe[:80]!r} is unknown; {known}")
    return RECIPES[recipe]


def rate_in_proportion(rate: float, size: float) -> float:
    """Return a recipe's learning rate for weights of another size, to two digits.

    AdamW steps by the rate whatever a weight's size. On Gemma-3-270M, whose matrices are 5.5 times smaller, SmolLM2's
    rates destroyed what the model knew, and rates in proportion did not (docs/forgetting.md).

    Args:
        rate: of the recipe.
        size: root mean square of the model's matrices.
    """
    return float(f"{rate * size / MEASURED_SIZE:.1e}")


def refuse_method_beside(recipe: str | None, given: Collection[str]) -> None:
    """Raise UserError if the user names a recipe and a method.

    Args:
        recipe: value of --recipe.
        given: names of the flags and YAML keys that the user sets.
    """
    if "method" in given and (chosen := settings_of(recipe)):
        raise UserError(
            f"--recipe {recipe} sets --method {chosen['method']} and values that were measured with it: leave out "
            "--method, or leave out --recipe and give its flags"
        )


def callback_settings(recipe: str | None, given: Collection[str]) -> dict[str, Any]:
    """Return what a recipe sets, by the names of PieceCallback's arguments, and the "learning_rate" it was measured at.

    Args:
        recipe: name of a recipe, or None for nothing.
        given: names of the arguments that the user gives.
    Raises:
        UserError: there is no such recipe, it has no mask, or a method is given beside it.
    """
    if recipe == "full":
        raise UserError('recipe "full" trains all weights, and PieceCallback selects some: use piece_ds train')
    chosen = {_ARGUMENT_OF.get(name, name): value for name, value in settings_of(recipe).items()}
    if chosen and "method" in given:
        raise UserError(f"recipe {recipe!r} sets method={chosen['method']!r}: leave out one of the two")
    return chosen


HELP = (
    f"On a pretrained model, begin with --recipe mask: {flags_in('mask')}. The rate is then put in proportion to the "
    "model's weights, and the log says it. If much is to be learned, --recipe wide: 10 % of the weights, drawn at "
    "random, which learned about as much or more; its deltas are ten times as large. With memory for the optimizer's "
    "states of all weights, --recipe full learns as much as the mask or more, and forgets about as little, but leaves "
    "no delta that goes on and off. --general_kl 0 leaves out what makes a step dearer. Without a recipe, the paper's "
    "own setting is the default (PIECE-S, 0.1 %), which forgets more at equal learning. Measurements: "
    "docs/forgetting.md."
)

# For a run that names no method.
NOTE = (
    "--method is not given: piece-s, the paper's. On a pretrained model --recipe mask keeps more of what the model "
    "knew (docs/forgetting.md)"
)
