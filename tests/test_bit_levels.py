"""Quality against bits in all: bytes that are really there, lines, levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hf_compress_evaluation import bit_levels
from hf_compress_evaluation.bit_levels import (
    Line,
    Point,
    best,
    levels_gained,
    lines,
    measure,
    pack,
    packed,
    table,
    total_bits,
    unpack,
    unpacked,
)
from hf_compress_plugins.language.topkld import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError


def test_packing_by_hand() -> None:
    """Three bits: 3 is 011, -1 is 111, -3 is 101; lowest bit first they are 110 111 10 | 1, and a byte is filled up."""
    data = pack(torch.tensor([3, -1, -3]), 3)
    assert data.tolist() == [0b01111011, 0b00000001]
    assert unpack(data, 3, 3).tolist() == [3, -1, -3]
    assert len(pack(torch.zeros(16, dtype=torch.int8), 2)) == 4


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_is_packed_is_unpacked(bits: int, count: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    whole = torch.randint(-half, half, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    data = pack(whole, bits)
    assert len(data) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(data, bits, count), whole)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_model_is_that_of_its_bytes(bits: int) -> None:
    model, _ = testing.models("text-generation")
    small = packed(model, bits)
    found = unpacked(model, small)
    for (name, own), other in zip(model.named_parameters(), found.parameters(), strict=True):
        wanted = dequantize(*quantize(own, bits), own) if own.dim() > 1 else own
        assert torch.equal(other, wanted), name
        assert (own.dim() > 1) == (name in small)
        if own.dim() > 1:
            assert len(other[0].unique()) <= 2**bits - 1
    assert packed(found, bits)["lm_head.weight"].data.tolist() == small["lm_head.weight"].data.tolist()


class Tied(nn.Module):
    """A table that is a head too, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight


def test_bits_in_all_by_hand() -> None:
    """60 weights of 3 bits in 23 bytes, ten scales of 16 bits, twelve of the norm in float32; the head is the table."""
    model = Tied()
    assert total_bits(model) == 32 * (60 + 12)
    assert total_bits(model, packed(model, 3)) == 8 * 23 + 16 * 10 + 32 * 12
    found = unpacked(model, packed(model, 3))
    assert found.head.weight is found.table.weight
    assert not torch.equal(found.head.weight, model.head.weight)


def test_a_point_is_measured_on_the_unpacked_weights() -> None:
    model = Tied()

    def quality(given_: Tied) -> float:
        return len(given_.table.weight.unique()) + 0.5

    rough, fine = (measure(model, quality, bits=bits, name="tied") for bits in (2, 8))
    whole = measure(model, quality, bits=None, name="tied")
    assert rough.quality <= 21.5 < whole.quality == 60.5
    assert (rough.bits, fine.bits, whole.bits) == (2, 8, 32)
    assert rough.total_bits < fine.total_bits < whole.total_bits == total_bits(model)
    for wrong in (math.nan, math.inf, 0.0):
        with pytest.raises(NumericalError, match="tied at 2 bits"):
            measure(model, lambda _, wrong=wrong: wrong, bits=2, name="tied")


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nothing to pack"):
        packed(nn.LayerNorm(4), 4)
    with pytest.raises(ConfigurationError, match="bits must be 2 to 8, got 1"):
        packed(nn.Linear(2, 2), 1)


def power(bits: int, scale: float) -> list[Point]:
    """Q = scale · M^-1/2 at three sizes."""
    sizes = (100, 400, 1600)
    return [Point(model=f"m{m}", bits=bits, total_bits=m, quality=scale * m**-0.5) for m in sizes]


def test_lines_are_power_laws() -> None:
    found = lines([*power(3, 8.0), *power(4, 4.0), Point(model="alone", bits=8, total_bits=9, quality=1.0)])
    assert sorted(found) == [3, 4]
    assert found[3].slope == pytest.approx(-0.5)
    assert math.exp(found[3].intercept) == pytest.approx(8.0)
    assert found[4].at(900) == pytest.approx(4 / 30)
    assert (found[4].lowest, found[4].highest) == (100, 1600)
    with pytest.raises(MismatchError, match="m100 occurs twice at 3 bits"):
        lines([*power(3, 8.0), *power(3, 4.0)])


def test_levels_are_counted_in_steps_of_one_width() -> None:
    before, wider = lines(power(3, 8.0))[3], lines(power(4, 4.0))[4]
    assert levels_gained(before, before, wider) == pytest.approx(0.0)
    assert levels_gained(before, wider, wider) == pytest.approx(1.0)
    assert levels_gained(before, lines(power(3, 2.0))[3], wider) == pytest.approx(2.0)
    assert levels_gained(before, lines(power(3, 16.0))[3], wider) == pytest.approx(-1.0)
    assert levels_gained(wider, wider, before) is None
    flat, half = (Line(slope=0.0, intercept=math.log(q), lowest=100, highest=10_000) for q in (4.0, 2.0))
    falling = Line(slope=-0.5, intercept=math.log(2 * 1000**0.5), lowest=100, highest=10_000)
    assert levels_gained(flat, falling, half) == pytest.approx(1.0)  # at M = 1,000, the middle
    apart = Line(slope=-1.0, intercept=0.0, lowest=5000, highest=9000)
    with pytest.raises(MismatchError, match="share no number of bits"):
        levels_gained(before, apart, wider)


def test_the_best_within_a_budget_and_the_table() -> None:
    points = [*power(3, 8.0), *power(4, 4.0)]
    assert best(points, 400) == points[4]
    assert best(points, 99) is None
    shown = table(points)
    assert shown[0] == ["model", "bits", "bits in all", "quality"]
    assert shown[1] == ["m100", "3", "100", "0.8"]
    assert [row[2] for row in shown[1:]] == ["100", "100", "400", "400", "1,600", "1,600"]


def test_two_s_complement_of_all_codes() -> None:
    whole = torch.arange(-8, 8).to(torch.int8)
    assert bit_levels.pack(whole, 4).dtype == np.uint8
    assert unpack(pack(whole, 4), 4, 16).tolist() == list(range(-8, 8))
