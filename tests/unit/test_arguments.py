"""Flags, YAML and defaults: who wins, what is known, and what is refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest

from piece_ds.cli import evaluate, select, train
from piece_ds.config import source as source_module
from piece_ds.config.parser import make_parser
from piece_ds.config.settings import OURS, load_settings, parse
from piece_ds.methods.registry import METHODS
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "mask_ratio: 0.2\nseed: 7\nbudget: layer\nmax-new-tokens: 3\n")
    settings = parse(["--config", config, "--mask_ratio", "0.3"], {"seed": 1, "budget": "tensor", "max_steps": 9})
    assert (settings.method.mask_ratio, settings.method.budget, settings.data.max_new_tokens) == (0.3, "layer", 3)
    assert (settings.flag("seed"), settings.flag("max_steps")) == ("7", "9")
    assert settings.given == {"mask_ratio", "seed", "budget", "max_new_tokens"}


@pytest.mark.parametrize("spelling", [["--mask_ratio", "0.5"], ["--mask-ratio", "0.5"], ["--mask_ratio=0.5"]])
def test_flags_have_every_usual_spelling(spelling: list[str]) -> None:
    assert parse(spelling).method.mask_ratio == 0.5
    assert parse(spelling).given == {"mask_ratio"}


def test_last_of_a_repeated_flag_wins() -> None:
    assert parse(["--mask_ratio", "0.5", "--mask_ratio", "0.25"]).method.mask_ratio == 0.25
    assert parse(["--seed", "1", "--seed=2"]).flag("seed") == "2"


def test_flag_of_nothing_is_none() -> None:
    assert parse([]).flag("deepspeed") is None


def test_values_of_yaml_reach_transformers_as_it_expects_them(tmp_path: Path) -> None:
    text = (
        "bf16: false\nlearning_rate: 1e-4\nreport_to: [none]\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 0.1}\noptim_args:\n"
    )
    config = write(tmp_path / "run.yaml", text)
    arguments = parse(["--config", config], {"use_cpu": True}).training_arguments(output_dir=tmp_path / "out")
    assert (arguments.bf16, arguments.learning_rate, arguments.report_to) == (False, 1e-4, [])
    assert arguments.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert arguments.optim_args is None
    assert not (tmp_path / "out").exists()


def test_every_call_makes_fresh_training_arguments(tmp_path: Path) -> None:
    settings = parse(["--seed", "3", "--output_dir", str(tmp_path)], {"use_cpu": True})
    first, second = settings.training_arguments(max_steps=5), settings.with_flags(seed=4).training_arguments()
    assert (first.max_steps, first.seed, second.max_steps, second.seed) == (5, 3, -1, 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnig_rate", "1"], r"unknown flag --learnig_rate\. Did you mean 'learning_rate'\?"),
        (["--mask_rat=1"], r"unknown flag --mask_rat\. Did you mean 'mask_ratio'\?"),
        (["--zzzzzz"], r"unknown flag --zzzzzz\.$"),
        (["--load_in_4bit", "True"], r"unknown flag --load_in_4bit\. Another trainer's; here .*give the 16-bit model"),
        (["--max-seq-length=9"], r"unknown flag --max-seq-length\. Another trainer's; here max_prompt_len"),
        (["--lora_rank", "4"], r"unknown flag --lora_rank\. Another trainer's; here lora_r, with method lora"),
        (["--mask_ratio", "many"], r"--mask_ratio.*invalid float value: 'many'"),
        (["--mask_ratio"], r"--mask_ratio.*expected one argument"),
        (["--mask_ratio", "nan"], r"--mask_ratio must be in \(0, 1\], got nan"),
        (["--importance_batch_size", "0"], r"--importance_batch_size must be positive, got 0"),
        (["--importance_lambda", "nan"], r"--importance_lambda must be positive, got nan"),
        (["--max_eval_samples", "-1"], r"--max_eval_samples must be positive, got -1"),
        (["--save_model", "lst"], r"--save_model 'lst' is unknown; known: last, each, never\. Did you mean 'last'\?"),
        (["--dtype", "bf16"], r"--dtype 'bf16' is unknown"),
        (["--update_mode", "compactt"], r"--update_mode 'compactt' is unknown"),
        (["--tasks", "a"], r"--task_dir and --tasks belong together"),
        (["--eval_file", "a"], r"--eval_file belongs to --train_file"),
        (["--config"], r"--config expects a YAML file"),
    ],
)
def test_bad_flags_are_refused_by_name(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(argv)


def test_values_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('run_name: "\\ud800"')
    for argv, name in (
        (["--config", str(tmp_path / "run.yaml")], "--run_name"),
        (["--run_name", "a\udcff"], "--run_name"),
        (["--train_file=\udcff.json"], "--train_file"),
        (["--task_dir", "x", "--tasks", "a,\ud83d"], "--tasks"),
        (["--seed", "1", "\udcff"], "--seed"),
    ):
        with pytest.raises(UserError, match=f"{name}: .* is no UTF-8 text") as error:
            parse(argv)
        str(error.value).encode()


def test_numbers_that_no_run_can_use_are_refused_by_every_flag_of_ours() -> None:
    checked = 0
    for part in OURS:
        for field in fields(part):
            kinds = str(field.type)
            values = ["nan", "inf", "-inf", "1e400"] if "float" in kinds else []
            values += ["9" * 25, "-" + "9" * 25, "1.5"] if "int" in kinds else []
            for value in values:
                with pytest.raises(UserError, match=f"--{field.name}"):
                    parse([f"--{field.name}={value}", "--train_file=a,b"])
                checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "abc"], r"--learning_rate.*invalid float value: 'abc'"),
        (["--lr_scheduler_type", "wavy"], r"wavy"),
        (["stray"], r"stray"),
    ],
)
def test_values_that_transformers_refuses_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(argv, {"use_cpu": True}).training_arguments()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", r"unknown key 'learnig_rate' in the YAML file\. Did you mean 'learning_rate'\?"),
        ("1: 2", r"unknown key '1' in the YAML file"),
        ("- seed", r"must map flag names to values, got a list"),
        ("", r"must map flag names to values, got nothing"),
        ("seed: [", r"is not YAML: .*line 1"),
        ("mask_ratio: many", r"--mask_ratio.*invalid float value: 'many'"),
    ],
)
def test_bad_yaml_is_refused_with_its_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--config", write(tmp_path / "run.yaml", text)])


def test_missing_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        parse([f"--config={tmp_path / 'none.yaml'}"])


def test_zero3_is_the_default_wherever_a_configuration_is_not_named(tmp_path: Path) -> None:
    named, silent = write(tmp_path / "a.yaml", "deepspeed: x.json"), write(tmp_path / "b.yaml", "seed: 1")
    assert load_settings(["--config", named]).flag("deepspeed") == "x.json"
    for argv in ([], ["--config", silent]):
        assert Path(str(load_settings(argv).flag("deepspeed"))).name == "zero3.json"


def test_asking_for_checkpoints_every_n_steps_turns_them_on(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "save_steps: 5")
    assert load_settings([]).flag("save_strategy") == "no"
    for argv in (["--save_steps", "5"], ["--save-steps=5"], ["--config", config]):
        assert load_settings(argv).flag("save_strategy") is None


def test_the_yaml_file_is_read_once_whatever_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    whole = source_module._take_config
    monkeypatch.setattr(source_module, "_take_config", lambda argv: reads.append(argv) or whole(argv))
    config = write(tmp_path / "run.yaml", "seed: 7\nmask_ratio: 0.2")
    settings = load_settings(["--config", config, "--budget", "layer"])
    (tmp_path / "run.yaml").unlink()
    again = settings.rebuilt({"mask_ratio": 0.5, "max_steps": 9}, {"method": "seqft", "budget": "tensor"})
    assert len(reads) == 1
    assert (again.method.method, again.method.mask_ratio, again.method.budget) == ("seqft", 0.2, "tensor")
    assert (again.flag("seed"), again.flag("max_steps"), again.flag("save_strategy")) == ("7", "9", "no")
    assert again.given == {"seed", "mask_ratio", "budget", "method"}
    assert again.rebuilt({}, {}).flag("max_steps") == "9"


def test_settings_without_the_method_keep_all_else(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("lora_r: 4\nmax_steps: 7\ngeneral_text: self\n")
    flags = ["--config", str(config), "--recipe=mask", "--save_full", "--mask_ratio", "0.5", "--learning_rate", "1e-3"]
    settings = parse(
        [*flags, "--seed", "3", "--general-kl=2", "--tasks", "a,b", "--task_dir", "d"],
        {"update_mode": "masked", "bf16": True},
    )
    plain = settings.without_method()
    assert (plain.method, plain.baseline) == (parse([]).method, parse([]).baseline)
    assert (plain.data.general_text, plain.flag("learning_rate"), plain.recipe_rate) == (None, None, None)
    assert (plain.data.tasks, plain.output.save_full) == ("a,b", True)
    assert (plain.flag("max_steps"), plain.flag("seed"), plain.flag("bf16")) == ("7", "3", "True")
    assert plain.given == {"max_steps", "save_full", "seed", "tasks", "task_dir"}
    assert plain.rebuilt({}, {}).given == plain.given
    assert settings.method.recipe == "mask"  # as it was


def test_help_lists_the_table_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    for script, word in ((train, "--help"), (select, "-h"), (evaluate, "--help"), (train, "-h")):
        script.main([word])
        shown = "".join(capsys.readouterr().out.split())  # argparse also breaks lines at hyphens
        for name, method in METHODS.items():
            assert "".join(f"{name}: {method.help}".split()) in shown


def test_limits_of_rows_are_positive() -> None:
    settings = parse(["--importance_rows", "5", "--max_train_samples", "7"])
    assert (settings.method.importance_rows, settings.data.max_train_samples) == (5, 7)
    for flag in ("--importance_rows", "--max_train_samples"):
        with pytest.raises(UserError, match=f"{flag} must be positive, got 0"):
            parse([flag, "0"])


def test_numbers_of_baselines_outside_their_range_are_refused_by_name() -> None:
    for flags, said, values in (
        (("lwf_temperature", "lora_r", "lora_alpha", "ewc_decay", "memory_ratio"), "must be positive", ("0", "-1")),
        (("ewc_decay", "memory_ratio"), r"must be in \(0, 1\]", ("1.5", "2")),
        (("ewc_lambda", "gem_margin", "lwf_weight", "o_lora_lambda"), "must not be negative", ("-0.5",)),
        (("lora_dropout",), r"must be in \[0, 1\)", ("1", "-0.5", "nan")),
    ):
        for flag in flags:
            for value in values:
                with pytest.raises(UserError, match=f"--{flag} {said}, got {value}"):
                    parse([f"--{flag}", value])
    for flag, value in (("ewc_decay", "1"), ("memory_ratio", "1"), ("lora_dropout", "0"), ("ewc_lambda", "0")):
        parse([f"--{flag}", value])


def test_shown_settings_are_those_given_with_the_values_in_force(tmp_path: Path) -> None:
    argv = ["--mask_ratio", "0.5", "--seed", "3", "--output_dir", str(tmp_path)]
    assert parse(argv, {"use_cpu": True}).shown() == {"mask_ratio": 0.5, "seed": 3, "output_dir": str(tmp_path)}


def test_values_of_yaml_mean_what_they_would_mean_as_flags(tmp_path: Path) -> None:
    """YAML itself reads `no` as false, `010` as eight, `1:30` as ninety and `1_000` as a thousand."""
    text = (
        "save_strategy: no\nseed: 010\ndata_seed: 007\nrun_name: 1:30\neval_strategy: 'no'\nbf16: off\n"
        "optim_args: null\nlearning_rate: 1e-4\nmax_steps: -1\npacking: yes\n"
    )
    settings = parse(["--config", write(tmp_path / "run.yaml", text)], {"use_cpu": True})
    arguments = settings.training_arguments(output_dir=tmp_path / "out")
    assert (arguments.save_strategy, arguments.eval_strategy, arguments.bf16) == ("no", "no", False)
    assert (arguments.seed, arguments.data_seed, arguments.run_name) == (10, 7, "1:30")
    assert (arguments.optim_args, arguments.learning_rate, arguments.max_steps) == (None, 1e-4, -1)
    assert settings.data.packing is True


def test_a_list_in_yaml_stands_for_commas_where_a_flag_takes_them(tmp_path: Path) -> None:
    text = "task_dir: d\ntasks: [law, 007]\nreport_to: [none]\nexclude:\n- '*norm*'\n- '*bias'\n"
    settings = parse(["--config", write(tmp_path / "run.yaml", text)])
    assert (settings.data.tasks, settings.model.exclude) == ("law,7", "*norm*,*bias")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1, 2]", r"key 'seed' in the YAML file takes one value, got a list of 2"),
        ("mask_ratio: []", r"key 'mask_ratio' in the YAML file takes one value, got a list of 0"),
        ("mask_ratio: {a: 1}", r"--mask_ratio.*invalid float value"),
        (f"importance_batch_size: {'9' * 5000}0.5", r"--importance_batch_size.*invalid int value"),
        (f"seed: [{'9' * 5000}]", r"is not YAML: .*digits"),
        ("seed: 1\nseed: 2", r"line 2: key 'seed' is given twice"),
        ("seed: 1\n--seed: 2", r"line 2: key 'seed' is given twice"),
        ("tasks: &a [*a]", r"is not YAML"),
        ("lr_scheduler_kwargs: &a {b: *a}", r"is not YAML|holds what JSON cannot"),
        ("lr_scheduler_kwargs: {a: 2024-01-01}", r"holds what JSON cannot"),
        ("[a]: 1", r"a key in the YAML file is a list or mapping"),
        ("[" * 3000, r"is not YAML"),
        ("base_model: x", r"unknown key 'base_model' .* Another trainer's; here model_name_or_path"),
        (
            "stage: sft\ndataset: d\nlora_rank: 8\ncutoff_len: 9\nzzz: 1",
            r"'dataset': Another trainer's; here train_file.*'cutoff_len': .*max_prompt_len.*'zzz'",
        ),
        ("sft: 1", r"unknown key 'sft' in the YAML file\.$"),
    ],
)
def test_yaml_that_means_nothing_here_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", write(tmp_path / "run.yaml", text)])
    assert len(str(caught.value)) < 1200


def test_a_configuration_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such file"):
            parse(["--config", path])


def test_a_refusal_is_cut_only_where_it_is_longer_than_it_may_be() -> None:
    """From its middle: the flag stands at the beginning, the reason at the end."""
    for length in (599, 600):
        text = "a" * 300 + "b" * (length - 300)
        with pytest.raises(UserError, match=f"^{text}$"):
            make_parser().error(text)
    with pytest.raises(UserError, match=r"^a{300} \.\.\. b{300}$"):
        make_parser().error("a" * 300 + "cc" + "b" * 300)
