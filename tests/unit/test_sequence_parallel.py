"""How rows are cut for ranks that share them, what the divisor of gradients is, and what is refused before a step."""

from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.models import make_model
from support.ranks import on_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from piece_ds.config.piece import PieceConfig
from piece_ds.methods.layer_sums import layer_sums
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.statistics import empty_stats
from piece_ds.training.compact_trainer import engine_of
from piece_ds.training.general_text import GeneralText
from piece_ds.zero import sequence_parallel, supported
from piece_ds.zero.nonfinite_counts import NonfiniteCounts
from piece_ds.zero.receiver import GradientReceiver
from piece_ds.zero.sequence_attention import _HAS_WHOLE_ROWS, whole_rows
from piece_ds.zero.sequence_parallel import (
    SequenceGroup,
    SequenceShards,
    attention_window,
    gradient_divisor,
    sequence_group,
    sequence_loss,
)

pytestmark = pytest.mark.heavy

ROWS = 3


def shards(place: int, size: int) -> SequenceShards:
    engine = SimpleNamespace(module=nn.Linear(1, 1), train_micro_batch_size_per_gpu=lambda: ROWS)
    with mock.patch.object(sequence_parallel, "sequence_group", return_value=SequenceGroup(size, place, 0, 1)):
        return SequenceShards([], engine)


def rows(num: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 90, (num, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, length - length // 3 :] = 0
    labels = ids.clone()
    labels[:, : length // 2] = -100
    labels[attention == 0] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def test_the_parts_of_all_ranks_are_the_rows() -> None:
    for num in (1, 2, ROWS):
        for length in (1, 2, 3, 7, 8, 9):
            whole = rows(num, length)
            targets = torch.cat([whole["labels"][:, 1:], torch.full((num, 1), -100)], dim=1)
            for size in (2, 3, 4):
                parts = [shards(place, size).part(whole) for place in range(size)]
                joined = {k: torch.cat([part[k] for part in parts], dim=1) for k in ("input_ids", "shift_labels")}
                positions = torch.cat([part["position_ids"] for part in parts], dim=1)
                assert joined["input_ids"].shape == (ROWS, -(-length // size) * size)
                assert torch.equal(joined["input_ids"][:num, :length], whole["input_ids"])
                assert torch.equal(joined["shift_labels"][:num, :length], targets)
                # What was added has no loss, and positions that go on.
                assert (joined["shift_labels"] != -100).sum() == (targets != -100).sum()
                assert torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions))
                count = max(1, int((targets != -100).sum()))
                assert all(int(part["num_items_in_batch"]) == count for part in parts)


def test_parts_of_a_loss_add_up_to_that_of_the_rows() -> None:
    """In an attention-free model, which needs no exchange."""
    torch.manual_seed(2)
    embed, head = nn.Embedding(90, 7), nn.Linear(7, 90)
    whole = rows(ROWS, 11)
    targets = whole["labels"]
    expected = nn.functional.cross_entropy(
        head(embed(whole["input_ids"]))[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    )
    for size in (2, 4):
        total = torch.zeros(())
        for place in range(size):
            part = shards(place, size).part(whole)
            logits = head(embed(part["input_ids"])).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, part["shift_labels"].flatten(), reduction="sum")
            total = total + loss / part["num_items_in_batch"]
        assert torch.allclose(total, expected)


def test_windows_are_read_from_the_configuration() -> None:
    windows = {
        None: (
            LlamaConfig(),
            MistralConfig(sliding_window=None),
            Qwen2Config(use_sliding_window=False, sliding_window=64),
        ),
        64: (MistralConfig(sliding_window=64), Gemma2Config(sliding_window=64)),
    }
    for window, configs in windows.items():
        for config in configs:
            assert attention_window(SimpleNamespace(config=config)) == window, type(config).__name__
    assert attention_window(nn.Linear(1, 1)) is None


def test_without_sequence_parallelism_everything_is_as_before() -> None:
    model = make_model("llama")
    engine = mock.MagicMock(side_effect=lambda **inputs: model(**inputs))
    engine.sequence_parallel_size, engine.device, engine.module = 1, torch.device("cpu"), model
    assert sequence_group(engine) == SequenceGroup(1, 0, 0, 1)
    batch = {"input_ids": torch.arange(1, 9).view(1, 8), "labels": torch.arange(1, 9).view(1, 8)}
    loss, mean = sequence_loss(engine, batch)
    assert torch.equal(loss.detach(), mean)
    assert torch.equal(mean, model(**batch).loss.detach())


def test_whole_rows_are_taken_only_inside_also_after_an_error() -> None:
    """What came after would attend to other ranks' rows as to its own."""
    takes = _HAS_WHOLE_ROWS.get
    for error in (None, ValueError):
        with suppress(ValueError), whole_rows():
            assert takes()
            with whole_rows():
                pass
            assert takes()
            if error is not None:
                raise error
        assert not takes()


def test_deepspeed_divides_by_ranks_at_zero_3_and_by_micro_batches_below() -> None:
    with mock.patch.object(sequence_parallel, "world_size", return_value=8):
        for stage, divisor in ((0, 2), (1, 2), (2, 2), (3, 8)):
            engine = SimpleNamespace(sequence_parallel_size=4, zero_optimization_stage=lambda stage=stage: stage)
            assert gradient_divisor(engine) == divisor


def test_a_trainer_that_shares_rows_needs_zero_3() -> None:
    kind = type("DeepSpeedEngine", (SimpleNamespace,), {})
    for stage in range(4):
        engine = kind(
            sequence_parallel_size=2,
            basic_optimizer=torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
            fp16_enabled=lambda: False,
            zero_optimization_stage=lambda stage=stage: stage,
        )
        trainer = SimpleNamespace(model_wrapped=engine)
        if stage == 3:
            assert engine_of(trainer) is engine
        else:
            with pytest.raises(UserError, match="below ZeRO-3"):
                engine_of(trainer)


def test_what_gives_the_model_whole_rows_is_refused() -> None:
    engine = SimpleNamespace(sequence_parallel_size=2)
    with pytest.raises(UserError, match="reads activations is not proven with sequence parallelism"):
        layer_sums(engine, [], {}, [], lambda inputs, outputs: outputs)
    for options in ({"general_replay": 0.5}, {"general_kl": 1.0}):
        trainer = SimpleNamespace(model=make_model("llama"))
        general = GeneralText(
            trainer, PieceConfig(), [{}], options.get("general_replay", 0.0), options.get("general_kl", 0.0)
        )
        with pytest.raises(UserError, match="general_kl is not proven with sequence parallelism"):
            general.check(engine)
        general.check(SimpleNamespace(sequence_parallel_size=1))


class Tokenwise(nn.Module):
    """A model whose tokens do not see each other, so that ranks need no exchange."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed, self.head = nn.Embedding(90, 7), nn.Linear(7, 90)

    def loss(self, part: dict[str, Tensor]) -> Tensor:
        logits = self.head(self.embed(part["input_ids"])).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, part["shift_labels"].flatten(), reduction="sum")
        return loss / part["num_items_in_batch"]


NUM_BATCHES = 5  # the last round of two groups has one


def added_parts(size: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    """This rank's sums of g and g^2 if `size` ranks share a row; and how many gradient entries were not finite."""
    model = Tokenwise().to(dtype)
    layout = layout_of(model)
    stats = empty_stats(layout, True, "cpu")
    counts = NonfiniteCounts(layout, torch.device("cpu"))
    engine = SimpleNamespace(module=model, device=torch.device("cpu"))
    receiver = GradientReceiver(engine, stats, counts, 1.0, 50, size)
    num_shards, shard, place = layout.num_ranks // size, layout.rank // size, layout.rank % size
    with receiver.hooks():
        for first in range(0, NUM_BATCHES, num_shards):
            receiver.begin_round(num_valid=min(num_shards, NUM_BATCHES - first))
            b = first + shard if first + shard < NUM_BATCHES else first
            loss = model.loss(shards(place, size).part(rows(ROWS, 6 + b)))
            with receiver.backward():
                loss.backward()
            receiver.end_round()
            counts.end_round(first)
    found = {}
    for info, part, offset in layout.owned():
        assert stats.grad_sum is not None
        found[f"{info.name} G"] = stats.grad_sum[offset : offset + part.numel].numpy()
        found[f"{info.name} F"] = stats.square_sum[offset : offset + part.numel].numpy()
    return found, counts.total()


def test_gradients_of_ranks_that_share_rows_are_added_before_they_are_squared() -> None:
    expected: dict[str, Tensor] = {}
    model = Tokenwise()
    for b in range(NUM_BATCHES):
        model.zero_grad()
        model.loss(shards(0, 1).part(rows(ROWS, 6 + b))).backward()
        for name, param in model.named_parameters():
            grad = param.grad.double().reshape(-1)
            expected[f"{name} G"] = expected.get(f"{name} G", 0.0) + grad
            expected[f"{name} F"] = expected.get(f"{name} F", 0.0) + grad * grad
    for num_ranks, size in ((2, 2), (4, 2), (4, 4), (2, 1)):
        results = on_ranks(num_ranks, lambda size=size: added_parts(size))
        for key, want in expected.items():
            got = torch.cat([torch.from_numpy(found[key]) for found, _ in results if key in found])
            assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-7), (num_ranks, size, key)
        assert all(count == 0 for _, count in results)


def test_bf16_gradients_of_ranks_that_share_rows_are_added_in_fp32() -> None:
    """Each rank's part is rounded to bf16, their sum is not."""
    expected: dict[str, Tensor] = {}
    model = Tokenwise().bfloat16()
    for b in range(NUM_BATCHES):
        grads: dict[str, Tensor] = {}
        for place in range(4):
            model.zero_grad()
            model.loss(shards(place, 4).part(rows(ROWS, 6 + b))).backward()
            for name, param in model.named_parameters():
                grads[name] = grads.get(name, 0.0) + param.grad.float().reshape(-1)
        for name, grad in grads.items():
            expected[name] = expected.get(name, 0.0) + grad
    results = on_ranks(4, lambda: added_parts(4, torch.bfloat16))
    for name, want in expected.items():
        got = torch.cat([torch.from_numpy(found[f"{name} G"]) for found, _ in results if f"{name} G" in found])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)


def test_a_gradient_that_comes_in_parts_is_found_and_waited_for() -> None:
    """Reentrant checkpointing runs a backward for each segment, so what both use gets two gradients."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.own, self.shared = nn.Linear(5, 5), nn.Linear(5, 5)

        def loss(self, x: Tensor, segmented: bool = True) -> Tensor:
            x = self.own(x).tanh()
            for _ in range(2):
                x = checkpoint(self.shared, x, use_reentrant=True).tanh() if segmented else self.shared(x).tanh()
            return x.square().sum()

    model, x = Shared(), torch.randn(3, 5)
    layout = layout_of(model)
    stats, counts = empty_stats(layout, True, "cpu"), NonfiniteCounts(layout, torch.device("cpu"))
    engine = SimpleNamespace(module=model, device=torch.device("cpu"))
    receiver = GradientReceiver(engine, stats, counts, 1.0, 10, 1)
    with receiver.hooks():
        receiver.begin_round(num_valid=1)
        with receiver.finding_parts(), receiver.backward():
            model.loss(x).backward()
        assert receiver.in_parts == {"shared.weight", "shared.bias"}
        assert not stats.square_sum.any()  # that backward only told
        with receiver.backward():
            model.loss(x).backward()
        receiver.end_round()
        counts.end_round(0)
    plain = torch.autograd.grad(model.loss(x, segmented=False), list(model.parameters()))
    wanted = {name: grad.reshape(-1) for (name, _), grad in zip(model.named_parameters(), plain, strict=True)}
    assert stats.grad_sum is not None
    for info, part, offset in layout.owned():
        got = stats.grad_sum[offset : offset + part.numel]
        torch.testing.assert_close(got, wanted[info.name], rtol=1e-5, atol=1e-6, msg=info.name)
        torch.testing.assert_close(stats.square_sum[offset : offset + part.numel], got**2)


def test_more_ranks_a_row_than_key_heads_are_refused() -> None:
    kind = type("DeepSpeedEngine", (SimpleNamespace,), {})
    for heads, size, fits in ((1, 2, False), (2, 4, False), (4, 4, True), (8, 2, True)):
        config = LlamaConfig(num_attention_heads=8, num_key_value_heads=heads)
        engine = kind(
            module=SimpleNamespace(config=config),
            sequence_parallel_size=size,
            optimizer=None,
            _config=SimpleNamespace(_param_dict={}),
            zero_optimization_stage=lambda: 2,
            autotp_size=lambda: 0,
            is_deepcompile_active=lambda: False,
        )
        assert (supported._refusal(engine) is None) == fits
        assert fits or f"{size} ranks and {heads} key and value heads" in str(supported._refusal(engine))
