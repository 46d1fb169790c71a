"""The planner's shapes are the published models', its arithmetic is that of hand sums, and bad settings are refused."""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import make_model

from piece_ds.__main__ import main
from piece_ds.cli.main import _parser
from piece_ds.config.arguments import ModelArguments
from piece_ds.config.piece import PieceConfig
from piece_ds.models.loading import empty_model, load_config
from piece_ds.plan.cards import CARDS, card_verdicts, fits
from piece_ds.plan.memory import MOMENTS, memory_terms, peak, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import KNOWN, ModelShape, known_config, shape_of
from piece_ds.plan.traffic import transfers
from piece_ds.runtime.errors import UserError

# Elements as the model cards' files count them.
PUBLISHED = {"1.5B": 1_543_714_304, "8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}
ROUND = ModelShape(
    total=1_000_000, eligible=900_000, largest=100_000, linear_edges=5_000, hidden=64, layers=2, vocab=100
)


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = shape_of(empty_model(known_config(name)))
    config = known_config(name)
    assert shape.total == PUBLISHED[name]
    assert shape.eligible == shape.total - config.vocab_size * config.hidden_size


def test_shape_of_a_tied_model_by_hand() -> None:
    """qwen3 of support.models: 5 query heads of 4, 1 key head, hidden 25, mlp 37, two layers, head tied."""
    edges = 2 * ((20 + 25) + 2 * (4 + 25) + (25 + 20) + 2 * (37 + 25) + (25 + 37))
    shape = shape_of(make_model("qwen3"))
    assert (shape.linear_edges, shape.hidden, shape.layers, shape.vocab) == (edges, 25, 2, 97)
    assert shape.total - shape.eligible == 97 * 25


def sizes(setting: Setting, moment: str, on_host: bool = False) -> float:
    return total(
        [t for t in memory_terms(ROUND, setting) if not t.is_estimate and t.name != "reduce buckets"], moment, on_host
    )


def test_general_text_beside_a_batch_adds_its_inputs_and_logits_to_the_backward_pass_alone() -> None:
    """50 tokens: 2 bytes of 2 layers' inputs of 64, and 2 + 8 + 20 bytes of 100 logits each."""
    without, beside = (memory_terms(ROUND, Setting(world=4, general_tokens=tokens)) for tokens in (0, 50))
    added = {moment: total(beside, moment) - total(without, moment) for moment in MOMENTS}
    assert added == {"statistics": 0, "backward": 50 * (2 * 64 * 2 + 30 * 100), "step": 0}
    with pytest.raises(UserError, match="--general_tokens must be 0 or more, got -1"):
        Setting(general_tokens=-1)


def test_masked_zero3_by_hand() -> None:
    """2 N + (4 + 8 + 4) T over 4 ranks, one more fp32 gradient in the step, 16 K / 4 positions; 8 E to select."""
    setting = Setting(world=4, update_mode="masked")
    assert sizes(setting, "backward") == 500_000 + 16 * 225_000 + 16 * 250
    assert sizes(setting, "step") == 500_000 + 20 * 225_000 + 16 * 250
    assert sizes(setting, "statistics") == 500_000 + 8 * 225_000 + 8 * 225_000
    assert (
        sizes(Setting(world=4, update_mode="masked", method="piece-f"), "statistics")
        == 500_000 + 8 * 225_000 + 4 * 225_000
    )


def test_compact_zero3_by_hand() -> None:
    """2 N / W + K (2 + 4 + 8 + 4) / W, K fp32 sums on every rank, and 8-byte positions of the owned, thrice."""
    setting = Setting(world=4, update_mode="compact")
    assert math.isclose(sizes(setting, "step"), 500_000 + 18 * 250 + 4 * 1_000 + (16 + 8) * 250)


def test_positions_on_the_cpu_by_hand() -> None:
    """A mask's own 8 bytes, and 8 of the masters; compact mode 8 of every selected, 4 of those in the weights."""
    for zero, compact in ((3, 8_000 + 4 * 250 + 8 * 250), (2, 8_000 + 4 * 1_000 + 8 * 250)):
        assert sizes(Setting(world=4, zero=zero, update_mode="compact"), "step", on_host=True) == compact
        assert sizes(Setting(world=4, zero=zero, update_mode="masked"), "step", on_host=True) == 8 * 250 + 8 * 250
    assert sizes(Setting(world=4, zero=0, update_mode="masked"), "step", on_host=True) == 8 * 250 + 8 * 1_000


def test_estimates_by_hand() -> None:
    """Of 2048 tokens in bf16 at stage 3 on four ranks; gradients of the statistics are exchanged in buckets."""
    terms = {term.name: term for term in memory_terms(ROUND, Setting(world=4)) if term.is_estimate}
    assert terms.keys() == {
        "a gradient formed whole",
        "gradients in exchange",
        "candidates",
        "gathered parameters, at most",
        "activations",
        "logits",
    } - ({"a gradient formed whole"} if not ROUND.formed_whole else set())
    assert terms["gradients in exchange"].size == 2 * (100_000 + 2 * 900_000)
    assert terms["candidates"].size == 12 * (4 * 1_000 + 65_536)
    assert terms["gathered parameters, at most"].size == 2 * 1_000_000
    assert terms["activations"].size == 2 * 2048 * 64 * (2 + 17)
    assert terms["logits"].size == (2 + 8) * 2048 * 100
    few = {term.name: term.size for term in memory_terms(replace(ROUND, eligible=8_000), Setting(world=4))}
    assert few["candidates"] == 12 * 2_000, "a rank has no more candidates than elements"


def test_gradients_of_every_stage_by_hand() -> None:
    """900,000 trained elements on four ranks: whole ones have T, parts a quarter of it."""
    whole, part = 900_000, 225_000
    masters, updated = "fp32 gradients of the masters", "updated parameters, before their copy"
    buffer, earlier = "buffer of the largest parameter", "gradients of earlier micro-batches"
    for options, wanted in (
        ({"zero": 0}, {"gradients": 2 * whole, "fp32 gradients": 4 * whole}),
        ({"zero": 0, "dtype": "fp32"}, {"gradients": 4 * whole, "fp32 gradients": 0}),
        ({"zero": 1}, {"gradients": 2 * part, "fp32 gradients": 4 * part}),
        ({"zero": 1, "accumulation": 2}, {"gradients": 2 * whole, "fp32 gradients": 4 * part}),
        ({"zero": 2}, {"fp32 gradients": 4 * part}),
        ({"zero": 3}, {"fp32 gradients": 4 * part, "fp32 gradients of a sub-group": 4 * part}),
        ({"zero": 3, "offload_optimizer": True}, {"fp32 gradients": 4 * part, masters: 4 * part}),
        (
            {"zero": 2, "offload_optimizer": True, "accumulation": 2},
            {masters: 4 * part, earlier: 4 * part, updated: 2 * part, buffer: 2 * 2 * 100_000},
        ),
        (
            {"zero": 1, "offload_optimizer": True, "accumulation": 2, "dtype": "fp32"},
            {masters: 4 * part, earlier: 4 * part, updated: 4 * part, buffer: 2 * 4 * 100_000},
        ),
    ):
        found: dict[str, float] = dict.fromkeys(wanted, 0)
        for term in memory_terms(ROUND, Setting(world=4, update_mode="masked", **options)):  # type: ignore[arg-type]
            if ("gradient" in term.name and not term.is_estimate) or term.name in (updated, buffer):
                found[term.name] = found.get(term.name, 0) + term.size
        assert {name: size for name, size in found.items() if size or name in wanted} == wanted, options


def test_gradients_are_counted_where_and_when_they_are_there() -> None:
    """On the device and on the host, during statistics, the backward pass and the step."""
    whole, part, k, none = 900_000, 225_000, 1_000, (0, 0, 0)
    offload = {"offload_optimizer": True}
    for options, device, host in (
        ({"zero": 0}, (0, 2 * whole, 6 * whole), none),
        ({"zero": 1}, (0, 2 * part, 4 * part), none),
        ({"zero": 1, "accumulation": 2}, (0, 2 * whole, 4 * part), none),
        ({"zero": 2}, (0, 4 * part, 4 * part), none),
        ({"zero": 3}, (4 * part, 4 * part, 8 * part), none),
        ({"zero": 3, **offload}, none, (8 * part, 8 * part, 8 * part)),
        ({"zero": 2, **offload}, [200_000] * 3, [6 * part + 200_000] * 3),
        (
            {"zero": 2, "accumulation": 2, **offload},
            [200_000] * 3,
            (6 * part + 200_000, 10 * part + 200_000, 10 * part + 200_000),
        ),
        (
            {"zero": 1, "accumulation": 2, "dtype": "fp32", **offload},
            [400_000] * 3,
            (8 * part + 400_000, 12 * part + 400_000, 12 * part + 400_000),
        ),
        ({"update_mode": "compact"}, (0, 5 * k, 5 * k), none),
        ({"update_mode": "compact", **offload}, (0, 4 * k, 4 * k), (0, k, k)),
    ):
        of_gradients = [
            term
            for term in memory_terms(ROUND, Setting(**{"world": 4, "update_mode": "masked", **options}))  # type: ignore[arg-type]
            if not term.is_estimate
            and ("gradient" in term.name or "copy" in term.name or "buffer of" in term.name or "their" in term.name)
        ]
        for on_host, wanted in ((False, device), (True, host)):
            assert [total(of_gradients, moment, on_host) for moment in MOMENTS] == list(wanted), (options, on_host)


def test_masters_and_moments_are_there_when_something_needs_them() -> None:
    """Plain fp32 at stage 0 has no masters; moments come with the first step, in 16 bits at stage 0 at the start."""
    for options, masters, moments in (
        ({"zero": 0, "dtype": "fp32"}, (0, 0, 0), (0, 8, 8)),
        ({"zero": 0}, (4, 4, 4), (8, 8, 8)),
        ({"zero": 1, "dtype": "fp32"}, (1, 1, 1), (0, 2, 2)),
        ({"zero": 3}, (1, 1, 1), (0, 2, 2)),
    ):
        terms = memory_terms(ROUND, Setting(world=4, update_mode="masked", **options))  # type: ignore[arg-type]
        for name, wanted in (("fp32 masters", masters), ("Adam moments", moments)):
            found = [total([term for term in terms if term.name == name], moment) for moment in MOMENTS]
            assert found == [900_000 * size for size in wanted], (options, name)


def test_a_head_of_its_own_gets_no_adapter() -> None:
    model = make_model("llama")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    inside = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert shape_of(model).linear_edges == sum(module.in_features + module.out_features for module in inside)


def test_lora_has_rank_times_rows_and_columns() -> None:
    setting = Setting(world=1, zero=0, dtype="fp32", update_mode="lora", lora_rank=8)
    assert sizes(setting, "step") == 4 * (1_000_000 + 40_000) + (8 + 4) * 40_000


def test_offload_moves_masters_and_moments_to_the_cpu() -> None:
    here, there = (Setting(world=4, update_mode="masked", offload_optimizer=off) for off in (False, True))
    assert sizes(here, "backward") - sizes(there, "backward") == 16 * 225_000
    assert sizes(there, "backward", on_host=True) == 20 * 225_000 + sizes(here, "backward", on_host=True)
    both = Setting(world=4, update_mode="masked", offload_optimizer=True, offload_param=True)
    assert sizes(there, "backward") - sizes(both, "backward") == 500_000
    # Earlier micro-batches wait on the CPU: in fp32 at stage 2, in the model's dtype at stage 1, if there are any.
    for stage, itemsize in ((1, 2), (2, 4)):
        one, several = (
            sizes(
                Setting(world=4, zero=stage, update_mode="masked", offload_optimizer=True, accumulation=count),
                "backward",
                on_host=True,
            )
            for count in (1, 2)
        )
        assert several - one == itemsize * 225_000


def test_peak_is_the_largest_moment() -> None:
    terms = memory_terms(ROUND, Setting(world=4, update_mode="masked"))
    assert peak(terms) == max((total(terms, moment), moment) for moment in MOMENTS)


def test_traffic_by_hand() -> None:
    """Ring: three quarters of a gather over 4 ranks, twice that of an all-reduce."""
    masked = Setting(world=4, zero=2, update_mode="masked", accumulation=3)
    received = {t.name: t.received for t in transfers(ROUND, masked)}
    assert received["gradients"] == 3 * 2 * 0.75 * 4 * 900_000
    assert received["updated parameters"] == 0.75 * 2 * 900_000
    for stage in (0, 1):  # they reduce once a step
        once = transfers(ROUND, Setting(world=4, zero=stage, update_mode="masked", accumulation=3))
        assert {t.name: t.received for t in once}["gradients"] == 2 * 0.75 * 4 * 900_000
    compact = {t.name: t.received for t in transfers(ROUND, Setting(world=4, update_mode="compact", accumulation=3))}
    assert compact["gradient of the selected"] == 2 * 0.75 * 4 * 1_000
    assert compact["parameters, forward"] == 3 * 0.75 * 2 * 1_000_000
    assert transfers(ROUND, Setting(world=1)) == []

    # At stage 0 every rank steps all values itself.
    alone = {t.name for t in transfers(ROUND, Setting(world=4, zero=0, update_mode="compact"))}
    assert alone == {"gradient of the selected", "statistics, per round"}

    # Of a large model, stage 3 still holds half a billion elements when each backward begins.
    large = replace(ROUND, total=2 * 10**9)
    large_received = {t.name: t.received for t in transfers(large, Setting(world=4, accumulation=3))}
    assert large_received["parameters, backward"] == 3 * 0.75 * 2 * (2 * 10**9 - 5 * 10**8)
    assert large_received["parameters, forward"] == 3 * 0.75 * 2 * 2 * 10**9


def test_a_plan_says_what_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An encoder and a mixture that cannot be are no plan; of quantized files it is that of a dequantized copy."""
    make_model("llama").config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    dense = json.loads(file.read_text())
    main(["plan", "--model", str(tmp_path)])
    plain = capsys.readouterr().out
    assert "quantized" not in plain
    file.write_text(json.dumps({**dense, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    main(["plan", "--model", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(1).startswith("its files are quantized (gptq), which training refuses")
    assert lines == plain.splitlines()

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    mixture = {"model_type": "mixtral", **sizes, "num_key_value_heads": 1, "vocab_size": 99, "num_local_experts": 8}
    cases: list[tuple[dict, str]] = [({"model_type": "bert", **sizes, "vocab_size": 99}, "makes it an encoder")]
    cases += [({**mixture, "num_experts_per_tok": k}, f"8 experts, of which a token would see {k}") for k in (-1, 0, 9)]
    for content, message in cases:
        file.write_text(json.dumps(content))
        with pytest.raises(SystemExit) as left:
            main(["plan", "--model", str(tmp_path)])
        printed = capsys.readouterr()
        assert left.value.code == 2
        assert message in printed.err
        assert len(printed.err.splitlines()) == 1
        assert not printed.out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{base}/gone", "there is no such folder"),
        ("./gone", "there is no such folder"),
        ("~/gone", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("gone.json", "there is no such file"),
        ("runs/gone", "there is no such folder, nor such a model on the Hub"),
        ("runs", "the folder holds no config.json"),
        ("adapter", "the folder holds a PEFT adapter alone"),
    ],
)
def test_what_is_not_there_is_not_told_as_a_hub_id(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as left:
        main(["plan", "--model", name.format(base=tmp_path)])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert f"no model can be loaded from there ({message}" in said
    assert "Repo id" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("heads", "keys"), [(4, 3), (4, 8), (6, 4)])
def test_key_heads_that_do_not_divide_the_heads_are_refused(
    heads: int, keys: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 48, "head_dim": 8, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": keys, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path)])
    said = capsys.readouterr().err
    assert f"num_attention_heads {heads} and num_key_value_heads {keys}" in said
    assert len(said.splitlines()) == 1


def test_an_encoder_decoder_is_refused_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path)])
    assert "is an encoder-decoder (T5Config)" in capsys.readouterr().err


def test_a_local_folder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    main(["plan", "--model", str(tmp_path), "--world", "2", "--update_mode", "masked"])
    printed = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters())} parameters" in printed
    assert "reduce-scatter" in printed


def test_a_config_json_alone_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").config.save_pretrained(tmp_path)
    main(["plan", "--model", str(tmp_path / "config.json")])
    whole = capsys.readouterr().out
    main(["plan", "--model_name_or_path", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1:] == whole.splitlines()[1:]


def test_a_plan_says_what_it_is_of_and_what_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Its defaults are the trainer's; every card has a verdict."""
    main(["plan", "--model", "8B", "--world", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "8 ranks, ZeRO-3, bf16, update_mode compact, 8030261 selected (0.1 %, piece-s), 2048 tokens x 1 a step and rank"
    )
    assert lines[2].startswith("fits 24 GB cards: needs 16.6")
    assert lines[3].startswith("From 40 GB cards on ZeRO-0 fits too and is faster: ")
    assert sum(bool(re.match(r"\d+ GB \(.* (yes|perhaps|no) ", line)) for line in lines) == len(CARDS)


def test_a_lower_stage_is_named_only_if_it_fits_a_card_and_is_not_the_one_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, named in (
        (["--model", "8B", "--zero", "2"], False),
        (["--model", "405B", "--world", "64"], False),
        (["--model", "1.5B", "--world", "8"], True),
    ):
        main(["plan", *flags])
        assert ("fits too and is faster" in capsys.readouterr().out) is named, flags


def test_update_mode_and_ratio_are_those_of_training() -> None:
    method = PieceConfig()
    assert (Setting().update_mode, Setting().ratio) == (method.update_mode, method.ratio)
    parsed = _parser().parse_args(["plan"])
    assert {name: getattr(parsed, name) for name in ("update_mode", "ratio", "dtype")} == {
        "update_mode": method.update_mode,
        "ratio": method.ratio,
        "dtype": Setting().dtype,
    }


def test_verdicts_follow_the_sums() -> None:
    """At the edge of what is needed: one byte less and only the sums without estimates fit, then nothing does."""
    setting = Setting(world=2, zero=2, update_mode="masked")
    terms = memory_terms(ROUND, setting)
    most = peak(terms)[0]
    certain = peak([term for term in terms if not term.is_estimate])[0]
    assert fits(ROUND, setting, most) == "yes"
    assert fits(ROUND, setting, most - 1) == "perhaps"
    assert fits(ROUND, setting, certain - 1) == "no"


def test_the_lowest_stage_fits_and_the_one_below_does_not() -> None:
    shape = shape_of(empty_model(known_config("8B")))
    for setting in (
        Setting(world=8),
        Setting(world=8, update_mode="full"),
        Setting(world=64, update_mode="masked", offload_optimizer=True),
        Setting(world=8, update_mode="full", offload_optimizer=True, offload_param=True),
    ):
        for verdict in card_verdicts(shape, setting):
            stage, usable = verdict.lowest_stage, verdict.usable_bytes
            if stage is None:
                assert fits(shape, replace(setting, zero=3), usable) != "yes"
            else:
                assert fits(shape, replace(setting, zero=stage), usable) == "yes"
                lowest = 3 if setting.offload_param else int(setting.offload_optimizer)
                for below in range(lowest, stage):
                    assert fits(shape, replace(setting, zero=below), usable) != "yes"
            if verdict.fits == "yes":
                assert stage is not None
                assert stage <= setting.zero


def test_configurations_that_describe_no_model_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").config.save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "model_type"):
        for value in ("x", None, 0, -1, [], 10**5000):
            text = json.dumps({**good, name: value if value != 10**5000 else "big"}).replace('"big"', "9" * 5000)
            (tmp_path / "config.json").write_text(text)
            with suppress(SystemExit):
                main(["plan", "--model", str(tmp_path)])
            printed = capsys.readouterr()
            assert len(printed.err.splitlines()) == (0 if printed.out else 1)


def test_the_table_has_every_model_at_every_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--table"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip("| "), int(row[1])) for row in rows] == [(m, w) for m in KNOWN for w in (1, 8, 64, 512)]
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "plan needs --model"),
        (["--model", "8b"], "Did you mean '8B'?"),
        (["--model", "8B", "--world", "0"], "--world must be positive"),
        (["--model", "8B", "--ratio", "0"], "--ratio must be in (0, 1]"),
        (["--model", "8B", "--zero", "2", "--offload_param"], "--offload_param needs --zero 3"),
        (["--model", "8B", "--zero", "0", "--offload_optimizer"], "--offload_optimizer needs --zero 1, 2 or 3"),
        (["--model", "8B", "--update_mode", "none"], "invalid choice"),
        (["--zero", "4"], "invalid choice"),
    ],
)
def test_bad_settings_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def experts_by_hand(config: dict) -> tuple[int, int, int, int]:
    """(elements, active elements, routers, elements of a layer's experts) of a published mixture, matrix by matrix."""
    hidden, vocab, width = config["hidden_size"], config["vocab_size"], config["moe_intermediate_size"]
    heads, layers, top = config["num_attention_heads"], config["num_hidden_layers"], config["num_experts_per_tok"]
    if config["model_type"] == "qwen3_moe":
        number, dense, shared = config["num_experts"], 0, 0
        keys = config["num_key_value_heads"]
        attention = 2 * (heads + keys) * config["head_dim"] * hidden + 2 * config["head_dim"]
    else:
        number, dense, shared = config["n_routed_experts"], config["first_k_dense_replace"], 3 * hidden * width
        q, kv, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        inner, value = config["qk_nope_head_dim"], config["v_head_dim"]
        attention = hidden * q + q + q * heads * (inner + rope) + hidden * (kv + rope) + kv
        attention += kv * heads * (inner + value) + heads * value * hidden
    experts, routers = 3 * number * hidden * width, number * hidden * (layers - dense)
    rest = (
        2 * vocab * hidden
        + hidden
        + layers * (attention + 2 * hidden)
        + dense * 3 * hidden * config["intermediate_size"]
    )
    rest += routers + (layers - dense) * shared
    return rest + (layers - dense) * experts, rest + (layers - dense) * experts * top // number, routers, experts


@pytest.mark.parametrize(
    ("config", "billions", "active"), [(QWEN3_30B_A3B, 30.5, 3.35), (DEEPSEEK_V3, 671.0, 37.55)], ids=["qwen3", "v3"]
)
def test_mixtures_are_those_that_were_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict, billions: float, active: float
) -> None:
    """Totals and active parameters as their model cards say (37 B and 3.3 B); embeddings count here."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["plan", "--model", str(tmp_path), "--world", "64"])
    printed = capsys.readouterr().out
    total_by_hand, active_by_hand, routers, experts = experts_by_hand(config)
    number = config.get("num_experts") or config["n_routed_experts"]
    assert f"{total_by_hand} parameters, {active_by_hand} active for a token (8 of {number} experts a layer)" in printed
    assert math.isclose(total_by_hand / 1e9, billions, rel_tol=2e-3)
    assert math.isclose(active_by_hand / 1e9, active, rel_tol=2e-3)

    shape = shape_of(empty_model(load_config(ModelArguments(model_name_or_path=str(tmp_path)))))
    assert shape.total - shape.eligible == config["vocab_size"] * config["hidden_size"] + routers
    assert shape.experts is not None
    assert shape.experts.width == config["moe_intermediate_size"]
    # A whole layer's experts are gathered at a time, though more than DeepSpeed would keep otherwise.
    assert experts < shape.together < 1.02 * experts
    terms = {t.name: t.size for t in memory_terms(shape, Setting(world=64))}
    assert terms["gathered parameters, at most"] == 2 * max(10**9, shape.together)
    assert terms["rows of experts"] == 2 * 2048 * 8 * (2 * config["hidden_size"] + 3 * config["moe_intermediate_size"])
    # Below 16 M elements a matrix's gradient is not sampled in bf16: of Qwen3 all, of DeepSeek-V3 that of down_proj.
    widest = 2 if config["model_type"] == "qwen3_moe" else 1
    assert terms["a gradient formed whole"] == 2 * experts * widest // 3
    narrow = {t.name: t.size for t in memory_terms(shape, Setting(world=64, dtype="fp32"))}
    assert narrow["a gradient formed whole"] < 2e6
    dense = {t.name: t.size for t in memory_terms(shape, Setting(world=64, selected_gradient="dense"))}
    assert dense["a gradient formed whole"] == 2 * experts * 2 // 3


def test_other_models_have_no_experts() -> None:
    shape = shape_of(make_model("llama"))
    assert shape.experts is None
    assert (shape.active, shape.together) == (shape.total, shape.largest)


def test_lists_of_experts_count_as_stacked_ones_do() -> None:
    model = make_model("listed")
    model.config.num_experts_per_tok = 2
    shape = shape_of(model)
    assert shape.experts is not None
    one = sum(param.numel() for param in model.model.layers[0].mlp.experts[0].parameters())
    assert (shape.experts.number, shape.experts.per_token) == (5, 2)
    assert shape.total - shape.active == 2 * 3 * one


def test_a_gradient_is_planned_whole_where_the_rule_does_not_sample_it() -> None:
    """A weight of 2048 x 2048 is too small in bf16, of 4096 x 4096 large enough, at 0.1 % and not at 1 %."""
    small, large = 1 << 22, 1 << 24
    shape = replace(ROUND, products=((small, small), (3 * large, large)), formed_whole=64)
    for options, wanted in (
        ({"ratio": 0.001}, small),
        ({"ratio": 0.01}, 3 * large),
        ({"ratio": 0.001, "dtype": "fp32"}, 64),
        ({"ratio": 0.001, "selected_gradient": "dense"}, ROUND.largest),
    ):
        setting = Setting(update_mode="compact", **options)
        sizes_of = {term.name: term.size for term in memory_terms(shape, setting)}
        assert sizes_of["a gradient formed whole"] == setting.itemsize * wanted, options
