"""Quality against the number of bits in all: which of many sizes and widths of weight is best for a given memory.

Ding et al.: Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models, 2025, arXiv:2501.06218; Dettmers,
Zettlemoyer: The case for 4-bit precision: k-bit Inference Scaling Laws, ICML 2023, arXiv:2212.09720.

    M = Σ_k parameters_k · bits_k + 16 bits for each scale            over one model
    log Q = a_b + s_b · log M                                          a line for each width b, over sizes of model

A width has the better scaling where its line lies below another's at one M (Q is a loss or a perplexity: lower is
better); a method gains a level if it moves the line of b bits onto that of b + 1 without it.

Nothing is simulated: the matrices' codes are packed into bytes, M is counted on those bytes, and Q is that of a model
whose weights were unpacked from them. Tables and head are packed too; what has one axis (norms, biases) keeps its type
and counts as it is. A parameter that is used twice counts once.

    points = [measure(model, loss, bits=bits, name=name) for name, model in models.items() for bits in (2, 3, 4, 8)]
    table(points);  lines(points)[3].at(1e6);  best(points, budget=1e6)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from hf_compress_plugins.language.topkld import dequantize, matrices, quantize
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError, MismatchError, NumericalError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One matrix in few bits."""

    data: NDArray[np.uint8]
    """The codes, each in so many bits, end to end; the last byte is filled with zeros."""
    scales: Tensor
    """(row, 1) float16."""
    bits: int

    @property
    def total_bits(self) -> int:
        """Of the bytes and the scales."""
        return 8 * self.data.nbytes + 8 * self.scales.nbytes


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model at one width."""

    model: str
    bits: int
    """Of a weight; the bits of its type where nothing was packed."""
    total_bits: int
    """M."""
    quality: float
    """Q, lower is better."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """log Q = intercept + slope · log M, natural logarithms, M in bits."""

    slope: float
    intercept: float
    lowest: int
    """The smallest M that it was fitted to."""
    highest: int

    def at(self, total_bits: float) -> float:
        """Q at that M; beyond the fitted range it is a guess."""
        return math.exp(self.intercept + self.slope * math.log(total_bits))


def pack(given: Tensor, bits: int) -> NDArray[np.uint8]:
    """Signed codes end to end in so many bits each, two's complement, lowest bit first.

    Args:
        given: integers in -2^(bits - 1) … 2^(bits - 1) - 1, any shape.
        bits: 1 … 8.

    Returns:
        (byte,) ⌈codes · bits / 8⌉ bytes.
    """
    flat = given.flatten().to(torch.int8).numpy().view(np.uint8)
    each = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little")


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> Tensor:
    """(code,) int8 of `pack`, the first `count`."""
    each = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    filled = np.concatenate([each, np.repeat(each[:, -1:], 8 - bits, axis=1)], axis=1)  # the sign goes on to the left
    return torch.from_numpy(np.packbits(filled, axis=1, bitorder="little").reshape(-1).view(np.int8).copy())


def packed(model: nn.Module, bits: int) -> dict[str, Packed]:
    """Each matrix of the model by name, in so many bits a weight.

    Raises:
        ConfigurationError: if bits are not 2 to 8, or the model has no matrix.
    """
    found = {}
    for name, parameter in matrices(model):
        whole, scales = quantize(parameter.cpu(), bits)
        found[name] = Packed(data=pack(whole, bits), scales=scales, bits=bits)
    if not found:
        raise ConfigurationError("bit levels: the model has no parameter of two axes: nothing to pack.")
    return found


def unpacked(model: Model, matrices_: Mapping[str, Packed]) -> Model:
    """A copy of the model whose matrices are those of the bytes."""
    found = copy.deepcopy(model)
    own = dict(found.named_parameters())
    with torch.no_grad():
        for name, each in matrices_.items():
            whole = unpack(each.data, each.bits, own[name].numel()).view(len(each.scales), -1)
            own[name].copy_(dequantize(whole, each.scales, own[name].cpu()))
    return found


def total_bits(model: nn.Module, matrices_: Mapping[str, Packed] | None = None) -> int:
    """M: of the packed matrices and of all other parameters in their own type."""
    chosen = matrices_ or {}
    others = (8 * each.nbytes for name, each in model.named_parameters() if name not in chosen)
    return sum(others) + sum(each.total_bits for each in chosen.values())


def measure(model: Model, quality: Callable[[Model], float], *, bits: int | None, name: str) -> Point:
    """One point of the table.

    Args:
        model: in full precision, or with weights that are rounded already, which packing leaves as they are.
        quality: from a model to Q, lower is better, above 0.
        bits: of a weight, 2 to 8; None: the model as it is.
        name: of the model, by which the table calls it.

    Raises:
        NumericalError: if Q is not finite or not above 0.
    """
    if bits is None:
        widest = max(8 * parameter.element_size() for parameter in model.parameters())
        found, total, bits = quality(model), total_bits(model), widest
    else:
        small = packed(model, bits)
        found, total = quality(unpacked(model, small)), total_bits(model, small)
    if not 0 < found < math.inf:
        raise NumericalError(f"bit levels: {name} at {bits} bits has a quality of {found}; a loss above 0 is expected.")
    return Point(model=name, bits=bits, total_bits=total, quality=found)


def lines(points: Iterable[Point]) -> dict[int, Line]:
    """The line of each width that has two sizes or more, by width, least squares of the logarithms.

    Raises:
        MismatchError: if a model occurs twice at one width.
    """
    by_bits: dict[int, list[Point]] = {}
    for point in points:
        own = by_bits.setdefault(point.bits, [])
        if any(other.model == point.model for other in own):
            raise MismatchError(f"bit levels: {point.model} occurs twice at {point.bits} bits. Give one treatment.")
        own.append(point)
    found = {}
    for bits, own in sorted(by_bits.items()):
        if len({point.total_bits for point in own}) < 2:
            continue
        sizes = [point.total_bits for point in own]
        slope, intercept = np.polyfit(np.log(sizes), np.log([point.quality for point in own]), 1)
        found[bits] = Line(slope=float(slope), intercept=float(intercept), lowest=min(sizes), highest=max(sizes))
    return found


def best(points: Sequence[Point], budget: float) -> Point | None:
    """The point of the best quality whose M is within the budget, in bits; None: there is none."""
    within = [point for point in points if point.total_bits <= budget]
    return min(within, key=lambda point: point.quality) if within else None


def levels_gained(before: Line, after: Line, wider: Line) -> float | None:
    """How far a method moves the line of a width towards that of the next one, at one M in the middle of all three.

    Args:
        before: of the width without the method.
        after: with it.
        wider: of the next width, without it.

    Returns:
        0 where the line stays, 1 where it lies on the wider one's, above 1 below that, negative where it became worse;
        in proportion of log Q. None where the wider one is no better at that M: there is no level to gain.

    Raises:
        MismatchError: if the three were fitted to ranges of M that have nothing in common.
    """
    every = (before, after, wider)
    low, high = max(line.lowest for line in every), min(line.highest for line in every)
    if low > high:
        raise MismatchError("bit levels: the three lines share no number of bits in all. Measure more sizes.")
    middle = math.sqrt(low * high)
    start, reached, aim = (math.log(line.at(middle)) for line in every)
    return (start - reached) / (start - aim) if aim < start else None


def table(points: Iterable[Point]) -> list[list[str]]:
    """Header and a line for each point, smallest M first."""
    found = [["model", "bits", "bits in all", "quality"]]
    for point in sorted(points, key=lambda each: each.total_bits):
        found.append([point.model, str(point.bits), f"{point.total_bits:,}", f"{point.quality:.4g}"])
    return found
