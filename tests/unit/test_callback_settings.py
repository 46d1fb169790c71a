"""What PieceCallback cannot do with a setting is said when it is made; what general text adds to a trainer's loss."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import make_micro_batches, make_model
from torch import nn
from transformers import Trainer, TrainingArguments

from piece_ds import PieceCallback
from piece_ds.config.piece import PieceConfig
from piece_ds.runtime.errors import UserError
from piece_ds.training.general_text import GeneralText
from piece_ds.training.trainer_checks import check_trainer

ROWS = [{"input_ids": [1, 2], "labels": [1, 2]}]


def test_general_text_and_what_uses_it_need_each_other() -> None:
    causal, scoring = make_model("llama"), nn.Linear(2, 1)
    scoring.get_output_embeddings = lambda: None  # type: ignore[assignment]
    for options, model, message in (
        ({"step_scale": "general"}, causal, "step_scale='general' needs general_text"),
        ({"method": "piece-ratio"}, causal, "method='piece-ratio' needs general_text"),
        ({"general_replay": 0.5}, causal, "general_replay=0.5 needs general_text"),
        ({"general_kl": 2.0}, causal, "general_kl=2 needs general_text"),
        ({"general_text": ROWS}, causal, "but no method, step_scale"),
        ({"general_text": ROWS, "general_replay": 1.5}, causal, r"must be in \[0, 1\]"),
        ({"general_text": ROWS, "general_kl": -1.0, "general_replay": 1.0}, causal, "0 or more"),
        ({"general_text": ROWS, "general_kl": 1.0, "general_share": 4.5}, causal, "at most 4"),
        ({"general_text": ROWS, "general_kl": 1.0, "general_share": float("nan")}, causal, "at most 4"),
        ({"general_text": ROWS, "method": "piece-ratio", "general_share": 1.0}, causal, "goes with general_replay"),
        ({"general_text": "selff", "general_kl": 1.0}, causal, "or \"self\", got 'selff'"),
        ({"general_text": "self", "general_kl": 1.0}, causal, "needs the trainer's tokenizer"),
        ({"general_text": "self"}, causal, "but no method, step_scale"),
        ({"recipe": "mask", "method": "piece-s"}, causal, "sets method='piece-ratio': leave out one"),
        ({"recipe": "mask", "config": PieceConfig()}, causal, "sets method='piece-ratio': leave out one"),
        ({"recipe": "full"}, causal, "trains all weights"),
        ({"recipe": "masc"}, causal, "is unknown; known: mask, wide, full, paper"),
        ({"general_text": ROWS, "general_kl": 1.0}, scoring, "needs a model that predicts tokens, got Linear"),
    ):
        with pytest.raises(UserError, match=message):
            PieceCallback(
                cast(Any, SimpleNamespace(model=model, args=TrainingArguments(report_to=[]))),
                update_mode="masked",
                **options,
            )


def test_trainers_without_deepspeed_or_with_an_adapter_are_refused_at_once(tmp_path: Path) -> None:
    """Before data is prepared and an engine is made; the models stay as they were."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    adapted = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    for model, told, message in (
        (make_model("llama"), None, r"expected a trainer with DeepSpeed, got one without: .*deepspeed="),
        (adapted, True, r"got PeftModel, whose adapter trains instead .* without peft_config"),
    ):
        trainer = Trainer(model=model, args=arguments)
        trainer.is_deepspeed_enabled = trainer.is_deepspeed_enabled if told is None else told
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(UserError, match=message):
            PieceCallback(trainer)
        assert [name for name, _ in model.named_parameters()] == names


def test_a_trainer_that_may_begin_anew_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], auto_find_batch_size=True)
    trainer = Trainer(model=make_model("llama"), args=arguments)
    trainer.is_deepspeed_enabled = True
    for mode in ("masked", "compact"):
        with pytest.raises(UserError, match=r"auto_find_batch_size begins another one .* per_device_train_batch_size"):
            PieceCallback(trainer, update_mode=mode)


def test_trainers_whose_model_is_not_the_one_that_trains_are_refused(tmp_path: Path) -> None:
    """One that makes its model later, and models with an adapter inside, which no wrapper shows."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    inside = make_model("llama")
    get_peft_model(inside, LoraConfig(target_modules=["q_proj"]))  # wraps it, and changes it
    added = make_model("llama")
    added.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for given, message in (
        ({"model_init": lambda: make_model("llama")}, r"model_init makes another one .* give Trainer the model itself"),
        ({"model": inside}, r"'model.layers.0.self_attn.q_proj' of this LlamaForCausalLM has an adapter of PEFT"),
        ({"model": added}, r"'model.layers.0.self_attn.q_proj' of this LlamaForCausalLM has an adapter of PEFT"),
    ):
        trainer = Trainer(args=arguments, **given)
        trainer.is_deepspeed_enabled = True
        for mode in ("masked", "compact"):
            with pytest.raises(UserError, match=message):
                PieceCallback(trainer, update_mode=mode)


def test_a_reference_that_is_paired_with_the_models_parameters_is_refused_in_compact_mode(tmp_path: Path) -> None:
    trainer = Trainer(model=make_model("llama"), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.is_deepspeed_enabled = True
    trainer.args.sync_ref_model = True
    names = [name for name, _ in trainer.model.named_parameters()]
    PieceCallback(trainer, update_mode="masked")
    with pytest.raises(UserError, match=r"sync_ref_model pairs .* use update_mode='masked'"):
        PieceCallback(trainer)
    assert [name for name, _ in trainer.model.named_parameters()] == names


def test_a_second_training_is_refused_in_either_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is selected or written: in masked mode the engine still trains, so nothing else would stop it."""
    for mode in ("masked", "compact"):
        trainer = Trainer(model=make_model("llama"), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        trainer.is_deepspeed_enabled = True
        callback = PieceCallback(trainer, update_mode=mode)
        callback.mask = cast(Any, object())  # as the first training has left it
        engine = SimpleNamespace(module=trainer.model)
        monkeypatch.setattr("piece_ds.training.callback.engine_of", lambda _, engine=engine: engine)
        with pytest.raises(UserError, match=r"serves one train\(\): .* another Trainer and callback"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_model_alone_holds_the_model(tmp_path: Path) -> None:
    """Compact mode leaves the model to DeepSpeed's part of a checkpoint; without that part nothing would be left."""
    for is_alone in (True, False):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_only_model=is_alone)
        trainer = Trainer(model=make_model("llama"), args=arguments)
        trainer.is_deepspeed_enabled = True
        PieceCallback(trainer)
        assert ("save_model" in vars(trainer)) == (not is_alone)


def test_one_callback_serves_one_training_of_one_trainer(tmp_path: Path) -> None:
    """Others are refused with what to make in their place."""
    trainer = Trainer(model=make_model("llama"), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.is_deepspeed_enabled = True
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(UserError, match="of one that has trained, make another Trainer"):
        PieceCallback(trainer)
    trainer.optimizer = None
    PieceCallback(trainer)
    with pytest.raises(UserError, match="by another PieceCallback already"):
        PieceCallback(trainer)


def test_weights_that_deepspeed_will_round_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, is_bf16, is_said in (
        (torch.float32, True, True),
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
    ):
        caplog.clear()
        arguments = SimpleNamespace(bf16=is_bf16, fp16=False)
        check_trainer(cast(Any, SimpleNamespace(model=make_model("llama").to(dtype), args=arguments)))
        assert ("DeepSpeed rounds them all" in caplog.text) == is_said


def test_the_trainers_loss_gains_general_texts_and_gets_its_own_back(tmp_path: Path) -> None:
    """Losses that the trainer adds up over a step get a part of the mean; those that it averages, all."""
    model, batch = make_model("llama").train(), make_micro_batches("llama", 1)[0]
    for is_summed in (True, False):
        trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        trainer.model_accepts_loss_kwargs, trainer.current_gradient_accumulation_steps = is_summed, 4
        config = PieceConfig(update_mode="masked")
        general = GeneralText(trainer, config, ROWS, replay=0.5, divergence=0.0)
        own = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1))
        general.begin(None, has_moved=False)
        got = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(1))
        alone = model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss
        torch.testing.assert_close(got - own, 0.5 * alone / (4 if is_summed else 1), rtol=1e-4, atol=1e-5)
        row: dict[str, float] = {}
        general.add_to_log(row)

        # A trainer that asks for the outputs too gets them, and the same loss.
        count = torch.tensor(1)
        loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=count)
        torch.testing.assert_close(loss, got)
        assert outputs["logits"].shape[:2] == batch["input_ids"].shape

        assert row["general_loss"] == pytest.approx(alone.item(), rel=1e-5)
        model.eval()
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(model(**batch).loss.item())
        model.train()
        assert general.loss is not None
        assert general.loss._rows.share == 0.5
        general.end()
        shared = GeneralText(trainer, config, ROWS, replay=0.5, divergence=0.0, share=2.0)
        shared.begin(None, has_moved=False)
        assert shared.loss is not None
        assert (shared.loss._rows.share, shared.loss._replay_weight) == (2.0, 0.5)
        shared.end()
        assert "compute_loss" not in vars(trainer)
