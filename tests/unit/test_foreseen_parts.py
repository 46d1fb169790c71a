"""A step whose gradients would come in parts is refused before anything is written, or is right."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import argument_sweep as sweep
from support.launches import make_rows, one_process, write_rows
from support.second_uses import language_model

from piece_ds.demo.model import make_tokenizer
from piece_ds.methods.lwf import LwF, _NumberedCollator
from piece_ds.zero.undisturbed import undisturbed

REENTRANT = ("--gradient_checkpointing=true", '--gradient_checkpointing_kwargs={"use_reentrant": true}')
OTHER = ("--gradient_checkpointing=true", '--gradient_checkpointing_kwargs={"use_reentrant": false}')

# Method and stage, for steps whose gradients DeepSpeed reduces.
REFUSED = (("magnitude", "zero2"), ("seqft", "zero3"), ("gem", "zero1"))
MORE_REFUSED = (("magnitude", "zero3"), ("ewc", "zero3"), ("lwf", "zero2"), ("replay", "zero1"), ("seqft", "zero2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rows, and a model with a block that is used twice."""
    with one_process():
        made = tmp_path_factory.mktemp("parts")
        language_model("zamba2", "", vocab_size=len(make_tokenizer(256))).save_pretrained(made / "model")
        make_tokenizer(256).save_pretrained(made / "model")
        write_rows(made / "train.jsonl", make_rows(0, 16, ("A", "B")))
        write_rows(made / "eval.jsonl", make_rows(1, 4, ("A", "B")))
        yield made


def outcome(folder: Path, method: str, stage: str, *flags: str) -> tuple[str, str]:
    more = ("--method", method, "--deepspeed", stage, "--update_mode", "masked", *flags)
    return sweep.outcome([*sweep.base_flags(folder), *more], folder / "out", trains=True)


def test_gradients_in_parts_are_refused_before_anything_is_written(folder: Path) -> None:
    for method, stage in REFUSED:
        found, said = outcome(folder, method, stage, *REENTRANT)
        assert (found, "use non-reentrant checkpointing" in said) == ("refused", True), (method, stage, found, said)


@pytest.mark.slow
def test_other_methods_are_refused_alike_and_what_is_right_trains(folder: Path) -> None:
    for method, stage in MORE_REFUSED:
        found, said = outcome(folder, method, stage, *REENTRANT)
        assert (found, "use non-reentrant checkpointing" in said) == ("refused", True), (method, stage, found, said)
    for case in (
        ("replay", "zero0", *REENTRANT),  # parts are added there
        ("seqft", "zero3", *OTHER),
        ("magnitude", "zero2", *OTHER),
        ("magnitude", "zero3", "--update_mode", "compact", *REENTRANT),
        ("lora", "zero2", *REENTRANT),  # the shared blocks are frozen
    ):
        assert outcome(folder, *case) == ("passed", ""), case


def test_rows_of_lwf_reach_workers_that_are_spawned() -> None:
    assert LwF.collate is not None
    made = pickle.loads(pickle.dumps(_NumberedCollator(make_batch)))
    assert made([{"teacher_row": 3}])["teacher_row"].tolist() == [3]
    assert "teacher_row" not in made([{}])


def make_batch(rows: object) -> dict[str, torch.Tensor]:
    return {}


def test_noise_is_off_while_importance_is_taken() -> None:
    """Of NEFTune on embeddings, and of routers; a threshold that PhiMoE reads without training stays.

    Scripts give whole numbers, which no command does.
    """
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Dropout(0.5))
    noise = {"neftune_noise_alpha": 5, "jitter_noise": 0.1, "input_jitter_noise": 0.2, "attention_dropout": 0.3}
    for name, value in {**noise, "router_jitter_noise": 0.01}.items():
        setattr(module[0], name, value)
    engine = type("Engine", (), {"module": module, "device": torch.device("cpu"), "train": module.train})()
    with undisturbed(engine):
        assert [getattr(module[0], name) for name in noise] == [0.0] * 4
        assert (module[1].p, module[0].router_jitter_noise) == (0.0, 0.01)
    assert [getattr(module[0], name) for name in noise] == list(noise.values())
    assert module[1].p == 0.5
