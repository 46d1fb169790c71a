"""What may be selected of a vision-language model: towers are found by transformers' own word for them."""

import logging
from contextlib import nullcontext

import pytest
import torch
from support.models import make_model
from support.vision import EMBEDDING, FAMILIES, is_in_tower, make_vision_model, vision_micro_batches
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from piece_ds.config.arguments import ModelArguments
from piece_ds.config.piece import PieceConfig
from piece_ds.methods.estimate import count_selected, select
from piece_ds.models.eligible import ineligible, is_tied, make_eligible, towers, without
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import check_eligible, freeze_ineligible
from piece_ds.preflight.checks import check_method_reads_images
from piece_ds.runtime.errors import UserError
from piece_ds.update.attach import prepare_compact

EMBEDDING_OF_TEXT = "model.embed_tokens.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_and_embeddings_are_frozen_and_nothing_else(family: str) -> None:
    model = make_vision_model(family)
    for param in model.parameters():
        param.requires_grad_(True)
    by_hand = {name for name, _ in model.named_parameters() if is_in_tower(family, name)} | {EMBEDDING}
    assert {info.name for info in layout_of(model).parameters if not info.eligible} == by_hand  # before any freezing
    freeze_ineligible(model)
    assert {name for name, param in model.named_parameters() if not param.requires_grad} == by_hand


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_add_to_what_is_eligible_the_embeddings_too(family: str) -> None:
    model = make_vision_model(family)
    default = {name for name, _ in model.named_parameters()} - ineligible(model)
    added = make_eligible(model, ["*.0.*norm1*", "*pos*embed*"])
    assert len(added) == 3
    assert {name for name, _ in model.named_parameters()} - ineligible(model) == default | set(added)
    make_eligible(model, ["*vis*"])
    assert ineligible(model) == {EMBEDDING}
    make_eligible(model, ["*"])
    assert ineligible(model) == set()


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("*vison*", "no parameter has such a name"),
        ("*language_model.norm*", "is already"),
    ],
)
def test_a_pattern_that_adds_nothing_is_refused_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_eligible(make_vision_model("llava"), [pattern])


def test_of_a_text_model_patterns_can_add_only_the_embeddings() -> None:
    model = make_model("qwen3")
    assert not towers(model)
    with pytest.raises(UserError, match="is already"):
        make_eligible(model, ["*mlp*"])
    with pytest.raises(UserError, match=r"no parameter has such a name; left out: model\.embed_tokens\.weight"):
        make_eligible(model, ["*vision*"])
    assert make_eligible(model, ["*embed*"]) == [EMBEDDING_OF_TEXT]
    freeze_ineligible(model, patterns=["*embed*"])
    assert all(param.requires_grad for param in model.parameters())
    assert next(info for info in layout_of(model).parameters if info.name == EMBEDDING_OF_TEXT).eligible


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_embeddings_that_are_the_head_too_are_warned_of(
    family: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    assert is_tied(model) == tied
    arguments = ModelArguments(model_name_or_path="x", eligible="*embed*")
    with caplog.at_level(logging.WARNING):
        check_eligible(arguments, model.config)
    assert ("are the output head too" in caplog.text) == tied
    assert "0 of the input embeddings" in caplog.text


def test_excluded_parameters_are_in_no_layout_mask_or_count() -> None:
    """Every way of saying it: on the model, on a layout, in prepare_compact(), in a PieceConfig."""
    excluded = {name for name, _ in make_model("llama").named_parameters() if "norm" in name}
    rest = {info.name for info in layout_of(make_model("llama")).eligible()} - excluded
    assert excluded
    assert rest

    model = make_model("llama")
    freeze_ineligible(model, excluded=["*norm*"])
    assert {info.name for info in layout_of(model).eligible()} == rest
    assert {name for name, param in model.named_parameters() if param.requires_grad} == rest

    model = make_model("llama")
    layout = without(layout_of(model), ["*norm*"])
    assert {info.name for info in layout.eligible()} == rest
    assert layout.total == layout_of(model).total
    mask = select(layout_of(model), "random", 1.0, exclude="*norm*")
    assert set(mask.index) == rest
    assert (
        mask.num_selected
        == layout.num_eligible
        == count_selected(PieceConfig(method="random", ratio=1.0, exclude="*norm*"), model)
    )

    values = prepare_compact(model, ratio=1.0, exclude="*norm*")
    assert values.eligible == rest
    assert values.values.numel() == layout.num_eligible
    assert {info.name for info in layout_of(model).eligible()} == rest


@pytest.mark.parametrize("pattern", ["*nrom*", "lm_haed"])
def test_excluding_nothing_is_refused_with_the_flag_or_the_argument(pattern: str) -> None:
    model = make_model("llama")
    with pytest.raises(UserError, match=r"^exclude '.*' matches no parameter"):
        select(layout_of(model), "random", 0.1, exclude=f"*norm*,{pattern}")
    with pytest.raises(UserError, match=r"^--exclude '.*' matches no parameter"):
        check_eligible(ModelArguments(model_name_or_path="x", exclude=pattern), model.config)
    with pytest.raises(UserError, match="leaves no parameter to select"):
        check_eligible(ModelArguments(model_name_or_path="x", exclude="*"), model.config)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "internvl", "paligemma", "idefics3", "glm4v", "mllama"])
def test_other_families_have_their_tower_found_and_their_projector_left_in(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind]())
    (tower,) = towers(model)
    left_out = ineligible(model)
    names = [name for name, _ in model.named_parameters()]
    assert all(name in left_out for name in names if name.startswith(tower) and "merger" not in name)
    assert [name for name in names if name not in left_out and any(w in name for w in ("projector", "merger", "conn"))]
    assert len([name for name in left_out if not name.startswith(tower)]) == 1  # the embedding


def test_a_model_whose_tower_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="does not say which part of FuyuForCausalLM encodes images"):
        check_eligible(ModelArguments(model_name_or_path="x"), CONFIG_MAPPING["fuyu"]())


@pytest.mark.parametrize(("method", "refused"), [("lora", True), ("replay", True), ("seqft", False), ("hft", False)])
def test_methods_not_proven_with_images_are_refused(method: str, refused: bool) -> None:
    config = make_vision_model("llava").config
    with pytest.raises(UserError, match="is not proven with models that read images") if refused else nullcontext():
        check_method_reads_images(method, config)
    check_method_reads_images(method, make_model("llama").config)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_runs_through_a_frozen_tower_for_the_sake_of_checkpointing(family: str) -> None:
    """Its first layer's output would need one if its input were made to; where a block trains, it must."""
    for pattern, expected in (((), False), (("*.1.*norm2*",), True)):
        model, seen = make_vision_model(family), []
        freeze_ineligible(model, patterns=pattern)
        (tower,) = towers(model).values()
        first = next(module for name, module in tower.named_modules() if name.endswith((".layers.0", "blocks.0")))
        first.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.requires_grad))
        model(**vision_micro_batches(family, 1)[0])
        assert seen == [expected]
