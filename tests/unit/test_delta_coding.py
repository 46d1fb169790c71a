"""Deltas of gaps and packed values: every door takes them, they are as small as promised, and damage is refused."""

import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.deltas import Run, make_run, sha256_of
from torch import nn

from piece_ds.__main__ import main
from piece_ds.checkpoint import delta_parts
from piece_ds.checkpoint.artifact import DELTA, write_artifact
from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.checkpoint.gaps import decode_gaps, encode_gaps
from piece_ds.checkpoint.packed_values import DTYPES, PACKED_ORDER, pack_values, unpack_values
from piece_ds.cli.main import _parser
from piece_ds.deltas import apply_delta_, compose, open_delta
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.zero.weights import read_selected


def by_hand(stream: torch.Tensor) -> list[int]:
    """Positions of a stream, bit by bit from the description of the format."""
    data = bytes(stream.tolist())
    low_bits, count = data[0], struct.unpack("<Q", data[1:9])[0]
    plane = -(-count // 8)
    bits = [data[9 + low_bits * plane + i // 8] >> (i % 8) & 1 for i in range(8 * (len(data) - 9 - low_bits * plane))]
    found, position, at = [], -1, 0
    for entry in range(count):
        high = bits.index(1, at) - at
        at += high + 1
        low = sum((data[9 + j * plane + entry // 8] >> (entry % 8) & 1) << j for j in range(low_bits))
        position += (high << low_bits) + low + 1
        found.append(position)
    return found


def test_positions_come_back_and_the_format_is_as_described() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [[0], [5], [0, 1, 2], [2**31 - 1, 2**31, 2**40], list(range(32)), [7, 2**61]]
    for length in (1, 31, 32, 33, 1009):
        for highest in (length, 40 * length, 10**9):
            cases.append(torch.randint(0, highest, (length,), generator=generator).unique().tolist())
    for case in cases:
        stream = encode_gaps(torch.tensor(case))
        assert decode_gaps(stream, len(case), case[-1] + 1).tolist() == case
        if case[-1] < 2**32:
            assert by_hand(stream) == case
        with pytest.raises(ValueError, match=r"past the parameter|expected"):
            decode_gaps(stream, None, case[-1])


def test_an_entry_takes_less_than_two_bytes_at_a_thousandth_and_the_chosen_k_is_the_best() -> None:
    index = (torch.rand(2_000_000, generator=torch.Generator().manual_seed(1)) < 1e-3).nonzero().view(-1)
    stream = encode_gaps(index)
    assert stream.numel() < 1.5 * index.numel()
    gaps = torch.diff(index, prepend=torch.tensor([-1])) - 1
    sizes = [k * -(-len(gaps) // 8) + -(-(len(gaps) + int((gaps >> k).sum())) // 8) for k in range(40)]
    assert stream.numel() == 9 + min(sizes)


def test_streams_that_are_none_are_refused() -> None:
    index = torch.tensor([3, 4, 90, 1000, 1001, 5000, 5001, 70_000, 70_001])
    good = encode_gaps(index)
    flipped = [good.clone() for _ in range(8 * good.numel())]
    for bit, stream in enumerate(flipped):
        stream[bit // 8] ^= 1 << (bit % 8)
    longer = torch.cat([good, torch.zeros(1, dtype=torch.uint8)])
    wrong = [good[:-1], good[:8], good[:0], longer, good.to(torch.int32), good.view(1, -1), torch.zeros_like(good)]
    for stream in wrong:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            decode_gaps(stream, index.numel(), 70_002)
    # A flipped low bit may give another sound stream: whatever is accepted ascends below the bound.
    for stream in flipped:
        with suppress(ValueError):
            found = decode_gaps(stream, index.numel(), 70_002)
            assert bool((found[1:] > found[:-1]).all())
            assert 0 <= int(found[0]) <= int(found[-1]) < 70_002
    with pytest.raises(ValueError, match="expected 8 entries"):
        decode_gaps(good, 8, 70_002)


def test_counts_that_no_file_can_hold_cost_no_memory() -> None:
    for low_bits in (0, 1, 62):
        head = torch.tensor([low_bits, *(2**62).to_bytes(8, "little"), 255], dtype=torch.uint8)
        with pytest.raises(ValueError, match="do not hold"):
            decode_gaps(head, None, 2**62)


def some_bits(dtype: torch.dtype, count: int, generator: torch.Generator) -> torch.Tensor:
    """Every kind of number: any bits, then both zeros, infinities, NaN and their neighbours."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integer)
    edges = torch.tensor([0, 1, -1, limits.min, limits.max, limits.min + 1, limits.max - 1], dtype=integer)
    bits = torch.randint(limits.min, limits.max, (count,), dtype=integer, generator=generator)
    return torch.cat([bits, edges]).view(dtype)


def unpacked_by_hand(stream: bytes, count: int) -> list[list[float]]:
    """The bf16 parts of a stream as numbers, from the description of the format."""
    assert stream[0] == 3
    rest, planes = stream[1:], []
    while rest:
        unpacker = zlib.decompressobj(-15)
        planes.append(unpacker.decompress(rest))
        rest = unpacker.unused_data
    parts, before = [], [0] * count
    for high, low in zip(planes[::2], planes[1::2], strict=True):
        numbers = [256 * h + w for h, w in zip(high, low, strict=True)]
        if parts:
            moves = [-(n + 1) // 2 if n % 2 else n // 2 for n in numbers]
            before = [(b + m) % 65536 for b, m in zip(before, moves, strict=True)]
        else:
            before = [65535 - n if n >= 32768 else n + 32768 for n in numbers]
        bits = [b - 32768 if b >= 32768 else 65535 - b for b in before]
        parts.append([struct.unpack("<f", struct.pack("<I", b << 16))[0] for b in bits])
    return parts


def test_values_come_back_to_the_bit_and_the_format_is_as_described() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for count in (0, 1, 500):
            whole = {name: some_bits(dtype, count, generator) for name in PACKED_ORDER}
            for names in (("values",), ("previous",), ("previous", "values"), PACKED_ORDER):
                stream = pack_values({name: whole[name] for name in names})
                found = unpack_values(stream, names, count + 7)
                assert found.keys() == set(names)
                for name in names:
                    assert torch.equal(found[name].view(torch.uint8), whole[name].view(torch.uint8)), (dtype, name)
                for wrong in (count + 6, count + 8):
                    with pytest.raises(ValueError, match=r"hold|unpacked"):
                        unpack_values(stream, names, wrong)
    previous = torch.randn(50, generator=generator).bfloat16()
    values = (previous.float() * 1.02 - 0.01).bfloat16()
    stream = pack_values({"previous": previous, "values": values})
    assert unpacked_by_hand(bytes(stream.tolist()), 50) == [previous.tolist(), values.tolist()]


def test_trained_values_take_less_than_three_bytes_of_four() -> None:
    generator = torch.Generator().manual_seed(0)
    previous = 0.05 * torch.randn(20_000, generator=generator)
    values = (previous + 1e-3 * torch.randn(20_000, generator=generator)).bfloat16()
    assert pack_values({"previous": previous.bfloat16(), "values": values}).numel() < 3 * 20_000


def test_damaged_packed_values_are_refused_or_sound() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {"previous": some_bits(torch.bfloat16, 40, generator), "values": some_bits(torch.bfloat16, 40, generator)}
    good = pack_values(parts)
    # A stream that promises a gigabyte costs no more than its own count.
    bomb = torch.frombuffer(bytearray(b"\3" + zlib.compress(bytes(1 << 20), wbits=-15)), dtype=torch.uint8)
    wrong = [good[:0], good[:1], good[:-1], good[1:], torch.cat([good, good[:1]]), good.int(), good.view(1, -1), bomb]
    for stream in wrong:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            unpack_values(stream, tuple(parts), 47)
    for bit in range(0, 8 * good.numel(), 5):
        stream = good.clone()
        stream[bit // 8] ^= 1 << (bit % 8)
        with suppress(ValueError):
            assert all(values.numel() == 47 for values in unpack_values(stream, tuple(parts), 47).values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), density=0.3)


@pytest.fixture(scope="module")
def small(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, its deltas coded as small as possible by the command."""
    folder = tmp_path_factory.mktemp("small")
    for delta in run.deltas:
        output = folder / delta.parent.name / delta.name
        output.parent.mkdir()
        main(["delta", "compose", str(delta), "--coding", "smallest", "--output", str(output)])
    return folder


def test_the_file_is_smaller_and_holds_the_same(run: Run, small: Path, tmp_path: Path) -> None:
    for plain in run.deltas:
        coded = small / plain.parent.name / plain.name
        first, second = open_delta(plain), open_delta(coded)
        assert (first.metadata["version"], second.metadata["version"]) == ("1", "3")
        assert coded.stat().st_size < plain.stat().st_size
        changes = dict(second.changes())
        for name, change in first.changes():
            for part in ("index", "values", "previous"):
                assert torch.equal(getattr(change, part), getattr(changes[name], part))
                assert torch.equal(getattr(change, part), getattr(second.change(name), part))
        # And back to the default, byte for byte.
        main(["delta", "compose", str(coded), "--output", str(tmp_path / "again")])
        main(["delta", "compose", str(plain), "--output", str(tmp_path / "plain")])
        assert (tmp_path / "again").read_bytes() == (tmp_path / "plain").read_bytes()
        for file in ("again", "plain"):
            (tmp_path / file).unlink()


def test_every_command_gives_the_same_with_either_coding(
    run: Run, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "apply": ["apply", str(run.base), "RUN", "--output", "OUT"],
        "merge": ["merge", str(run.base), "RUN", "--output", "OUT"],
        "ties": ["merge", str(run.base), "RUN", "--how", "ties", "--density", "0.5", "--output", "OUT"],
        "compose": ["compose", "RUN", "--output", "OUT.safetensors"],
        "scale": ["scale", "RUN/00-task", "--alpha", "0.5", "--output", "OUT.safetensors"],
        "scale-small": ["scale", "RUN/00-task", "--alpha", "0.5", "--output", "OUT.safetensors", "--coding=smallest"],
        "prune": ["prune", "RUN/00-task", "--keep", "0.5", "--output", "OUT.safetensors"],
        "vllm": ["export", "RUN/00-task", "--format", "vllm", "--output", "OUT.safetensors"],
    }
    for name, words in commands.items():
        outputs = []
        for kind, folder in (("plain", run.folder), ("small", small)):
            output = tmp_path / f"{name}-{kind}"
            main(["delta", *(w.replace("RUN", str(folder)).replace("OUT", str(output)) for w in words)])
            found = output if output.is_dir() else output.with_name(f"{output.name}.safetensors")
            hashes = sha256_of(found) if found.is_dir() else {"": found.read_bytes()}
            outputs.append({file: content for file, content in hashes.items() if file != "piece_ds.json"})
        assert outputs[0] == outputs[1], name
    # Taken off again, in place.
    main(["delta", "revert", str(tmp_path / "apply-small"), str(small), "--in_place"])
    assert sha256_of(tmp_path / "apply-small") == sha256_of(run.base)
    capsys.readouterr()
    main(["delta", "list", str(small)])
    main(["delta", "inspect", str(small)])
    assert "00-task" in capsys.readouterr().out


def test_a_scaled_delta_of_gaps_comes_back_to_the_bit(run: Run, tmp_path: Path) -> None:
    half, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    main(["delta", "scale", str(run.deltas[0]), "--alpha", "0.5", "--coding", "smallest", "--output", str(half)])
    main(["delta", "scale", str(half), "--alpha", "1", "--output", str(whole)])
    assert open_delta(half).metadata["version"] == "3"
    first, second = load_file(run.deltas[0]), load_file(whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Pruned(nn.Module):
    """Two weights in 16 bits; one is pruned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(40, 40, bias=False, dtype=torch.bfloat16)
        self.two = nn.Linear(40, 40, bias=False, dtype=torch.float16)


def test_zeros_are_left_out_and_minus_zero_is_not(tmp_path: Path) -> None:
    model = _Pruned()
    index = torch.arange(3, 1600, 7)
    mask = Mask(layout_of(model), {"one.weight": index, "two.weight": index}, 2 * index.numel(), "pruned", 0.01)
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    previous = read_selected(model, mask)
    with torch.no_grad():
        model.one.weight.view(-1)[index] = 0.0
        model.two.weight.view(-1)[index] = -0.0
    save_delta(tmp_path / "plain", model, mask, previous)
    for with_previous in (True, False):
        path = tmp_path / f"zeros-{with_previous}"
        compose([open_delta(tmp_path / "plain")], path, with_previous=with_previous, coding="smallest")
        delta, tensors = open_delta(path), load_file(path)
        assert json.loads(delta.metadata["zeros"]) == {"one.weight": "bfloat16"}
        assert ("one.weight.packed" in tensors, "two.weight.packed" in tensors) == (with_previous, True)
        fresh = _Pruned()
        live = apply_delta_(fresh, path)
        for name, param in model.named_parameters():
            assert torch.equal(dict(fresh.named_parameters())[name].view(torch.int16), param.view(torch.int16))
        if with_previous:
            live.set_(0.0)
            assert all(torch.equal(param, base[name]) for name, param in fresh.named_parameters())
    assert torch.equal(load_previous(tmp_path / "zeros-True", mask)["one.weight"], previous["one.weight"])


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    index = torch.arange(0, 1600, 100)
    gaps, values = encode_gaps(index), torch.ones(16, dtype=torch.bfloat16)
    packed = pack_values({"values": values})
    metadata = {"shapes": json.dumps({"w": [40, 40]}), "selected": "16", "total": "1600"}
    plain = {"w.indices": index.int(), "w.values": values}
    coded = {"w.gaps": gaps, "w.values": values}
    cases = {
        "both codings": (plain | coded, {}, "2"),
        "gaps in version 1": (coded, {}, "1"),
        "zeros in version 1": ({"w.indices": index.int()}, {"zeros": '{"w": "bfloat16"}'}, "1"),
        "no values": ({"w.gaps": gaps}, {}, "2"),
        "values and zeros": (coded, {"zeros": '{"w": "bfloat16"}'}, "2"),
        "zeros of another": (coded, {"zeros": '{"v": "bfloat16"}'}, "2"),
        "zeros of no dtype": ({"w.gaps": gaps}, {"zeros": '{"w": "int4"}'}, "2"),
        "too few": ({"w.gaps": encode_gaps(index[:-1]), "w.values": values}, {}, "2"),
        "past the end": ({"w.gaps": encode_gaps(index + 101), "w.values": values}, {}, "2"),
        "not bytes": ({"w.gaps": gaps.int(), "w.values": values}, {}, "2"),
        "cut": ({"w.gaps": gaps[:-1].clone(), "w.values": values}, {}, "2"),
        "unknown version": (coded, {}, "4"),
        "packed, and nothing says so": ({"w.gaps": gaps, "w.packed": packed}, {}, "3"),
        "packed in version 2": ({"w.gaps": gaps, "w.packed": packed}, {"packed": '["values"]'}, "2"),
        "packed and plain": (coded | {"w.packed": packed}, {"packed": '["values"]'}, "3"),
        "packed, of other parts": ({"w.gaps": gaps, "w.packed": packed}, {"packed": '["values", "previous"]'}, "3"),
        "packed, of unknown parts": ({"w.gaps": gaps, "w.packed": packed}, {"packed": '["values", "later"]'}, "3"),
        "packed, no list": ({"w.gaps": gaps, "w.packed": packed}, {"packed": '"values"'}, "3"),
        "packed, cut": ({"w.gaps": gaps, "w.packed": packed[:-1].clone()}, {"packed": '["values"]'}, "3"),
        "packed, too few": (
            {"w.gaps": gaps, "w.packed": pack_values({"values": values[1:]})},
            {"packed": '["values"]'},
            "3",
        ),
        "packed, not bytes": ({"w.gaps": gaps, "w.packed": packed.int()}, {"packed": '["values"]'}, "3"),
        "packed and zeros": (
            {"w.gaps": gaps, "w.packed": packed},
            {"packed": '["values"]', "zeros": '{"w": "bfloat16"}'},
            "3",
        ),
    }
    write_artifact(tmp_path / "good", DELTA, coded, metadata, "2")
    assert open_delta(tmp_path / "good").change("w").index.tolist() == index.tolist()
    write_artifact(
        tmp_path / "good", DELTA, {"w.gaps": gaps, "w.packed": packed}, metadata | {"packed": '["values"]'}, "3"
    )
    assert torch.equal(open_delta(tmp_path / "good").change("w").values, values)
    for what, (tensors, more, version) in cases.items():
        write_artifact(tmp_path / "bad", DELTA, tensors, metadata | more, version)
        with pytest.raises(UserError) as error:
            open_delta(tmp_path / "bad")
        assert "\n" not in str(error.value), what


def test_the_command_offers_the_codings_there_are() -> None:
    words = ["delta", "compose", "X", "--output", "Y"]
    parsed = [_parser().parse_args([*words, "--coding", coding]) for coding in delta_parts.CODINGS]
    assert tuple(arguments.coding for arguments in parsed) == delta_parts.CODINGS
    assert _parser().parse_args(words).coding == delta_parts.CODINGS[0]
