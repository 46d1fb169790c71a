"""--recipe sets the flags that were measured together; other flags win over it, but for the method."""

from pathlib import Path

import pytest

from piece_ds.config.recommended import HELP, RECIPES, flags_in
from piece_ds.config.settings import parse
from piece_ds.runtime.errors import UserError


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_means_its_flags(recipe: str, tmp_path: Path) -> None:
    by_name, by_flags = parse(["--recipe", recipe]), parse(flags_in(recipe).split())
    named, given = by_name.resolved(), by_flags.resolved()
    assert named["MethodArguments"].pop("recipe") == recipe
    assert given["MethodArguments"].pop("recipe") is None
    assert named == given
    assert by_name.training_arguments().learning_rate == by_flags.training_arguments().learning_rate
    assert by_name.given == by_flags.given | {"recipe"}

    # A YAML file names it as well.
    config = tmp_path / "run.yaml"
    config.write_text(f"recipe: {recipe}\n", encoding="utf-8")
    assert parse(["--config", str(config)]).resolved() == parse(["--recipe", recipe]).resolved()


def test_flags_and_yaml_win_over_a_recipe_and_a_recipe_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("mask_ratio: 0.1\ngeneral_kl: 2\n", encoding="utf-8")
    settings = parse(
        ["--recipe=mask", "--general_kl", "0", "--config", str(config)], {"learning_rate": 5e-5, "step_scale": "none"}
    )
    assert (settings.method.mask_ratio, settings.method.general_kl) == (0.1, 0.0)
    assert settings.method.step_scale == "general"
    assert settings.training_arguments().learning_rate == 1e-3


def test_values_built_around_a_recipe_keep_their_places() -> None:
    """A comparison gives each of its runs a method of its own."""
    settings = parse(["--recipe", "mask", "--mask_ratio", "0.02"])
    assert settings.rebuilt({"general_kl": 1, "seed": 3}).method.general_kl == 4
    other = settings.rebuilt({}, {"method": "seqft", "learning_rate": 1e-5})
    assert (other.method.method, other.training_arguments().learning_rate) == ("seqft", 1e-5)
    assert other.method.mask_ratio == 0.02


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "maks"], "--recipe 'maks' is unknown; known: mask, wide, full, paper. Did you mean 'mask'?"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "mask", "--method", "lora"], "--recipe mask sets --method piece-ratio"),
        (["--recipe", "x" * 9999], "is unknown; known"),
    ],
)
def test_what_is_no_recipe_or_speaks_against_it_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(argv)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 600


def test_the_help_names_every_flag_of_the_first_recipe() -> None:
    assert all(f"--{name} " in HELP for name in RECIPES["mask"])
