"""Self-attention relations against the papers' formulas, sentence by sentence, and their settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hf_compress_plugins.encoders.minilm import (
    MiniLM,
    log_relation,
    minilm_relation,
    split_heads,
)
from scene import signals, sizes, step
from torch import Tensor

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.taps import joined_heads

HEADS = 2
TOKENS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False, True, True, False, False]])


def vectors(width: int, seed: int, time: int = 5) -> Tensor:
    """(3, time, width)"""
    return torch.randn(3, time, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(width: int, seed: int) -> Tensor:
    """(3, HEADS, 5, width / HEADS): as attention has them."""
    return vectors(width, seed).view(3, 5, HEADS, -1).transpose(1, 2)


def relation(student: int = 0, teacher: int = 10, **settings: Any) -> Tensor:
    return minilm_relation(
        (vectors(4, student), vectors(4, student + 1)),
        (vectors(8, teacher), vectors(8, teacher + 1)),
        settings.pop("tokens", TOKENS),
        heads=settings.pop("heads", HEADS),
        **settings,
    )


def by_hand(sentence: int, causal: bool = False) -> float:
    """Section 3 of both papers, written out: rows and columns of padding cut off, loops over heads and tokens."""
    keep = TOKENS[sentence]
    maps = []
    for width, seed in ((8, 10), (4, 0)):
        left, right = (
            vectors(width, s)[sentence][keep].view(int(keep.sum()), HEADS, -1).transpose(0, 1) for s in (seed, seed + 1)
        )
        scores = left @ right.transpose(-1, -2) / math.sqrt(width / HEADS)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        maps.append(scores.softmax(-1))
    total = 0.0
    for p, q in zip(maps[0].flatten().tolist(), maps[1].flatten().tolist(), strict=True):
        total += p * (math.log(p) - math.log(q)) if p > 0 else 0.0
    return total / (HEADS * int(keep.sum()))


@pytest.mark.parametrize("causal", [False, True])
def test_the_papers_formula_written_out(causal: bool) -> None:
    found = relation(causal=causal)

    assert found.tolist() == pytest.approx([by_hand(sentence, causal) for sentence in range(3)])


def test_two_tokens_by_hand() -> None:
    """Student vectors of zeros relate evenly, (½, ½); the teacher's rows are (¾, ¼) and (½, ½)."""
    left = torch.tensor([[[math.log(3.0)], [0.0]]])
    right = torch.tensor([[[1.0], [0.0]]])

    found = minilm_relation((left * 0, right * 0), (left, right), torch.ones(1, 2, dtype=torch.bool), heads=1)

    assert found.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)


def test_v1_of_the_attention_heads_is_the_attention_itself() -> None:
    """With as many relation heads as attention heads, q with k is softmax(q kᵀ / √d), as attention computes it."""
    q, k = heads_of(8, 0), heads_of(8, 1)
    mask = TOKENS[:, None, None, :]

    found = log_relation(joined_heads(q), joined_heads(k), mask, HEADS).exp()

    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, torch.eye(5).expand(3, HEADS, 5, 5).double(), mask
    )
    torch.testing.assert_close(found, expected)


def test_heads_are_split_along_the_width_not_the_time() -> None:
    split = split_heads(torch.arange(12.0).view(1, 2, 6), 3)

    assert split.tolist() == [[[[0.0, 1.0], [6.0, 7.0]], [[2.0, 3.0], [8.0, 9.0]], [[4.0, 5.0], [10.0, 11.0]]]]
    torch.testing.assert_close(joined_heads(split), torch.arange(12.0).view(1, 2, 6))


def test_equal_relations_give_zero() -> None:
    pair = (vectors(4, 0), vectors(4, 1))

    torch.testing.assert_close(minilm_relation(pair, pair, TOKENS, heads=HEADS), torch.zeros(3, dtype=torch.float64))


def test_it_is_at_least_zero() -> None:
    assert all((relation(seed, 100 + seed) > 0).all() for seed in range(0, 20, 2))


def test_a_sentence_does_not_depend_on_the_others_nor_on_padding() -> None:
    alone = minilm_relation(
        (vectors(4, 0)[1:2, :3], vectors(4, 1)[1:2, :3]),
        (vectors(8, 10)[1:2, :3], vectors(8, 11)[1:2, :3]),
        torch.ones(1, 3, dtype=torch.bool),
        heads=HEADS,
    )

    torch.testing.assert_close(relation()[1:2], alone)


@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_padding_changes_neither_value_nor_gradient(causal: bool) -> None:
    found = []
    for fill in (0.0, math.nan):
        pad = ~TOKENS[..., None]
        student = tuple(vectors(4, seed).masked_fill(pad, fill).requires_grad_() for seed in (0, 1))
        teacher = tuple(vectors(8, seed).masked_fill(pad, fill) for seed in (10, 11))
        value = minilm_relation(student, teacher, TOKENS, heads=HEADS, causal=causal)  # type: ignore[arg-type]  # two
        value.sum().backward()
        found.append((value.detach(), student[0].grad, student[1].grad))

    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].isfinite().all()


def test_causal_rows_do_not_see_what_comes_later() -> None:
    """Another last token changes the last row alone; cut off, it changes nothing."""
    tokens = torch.ones(3, 5, dtype=torch.bool)
    before = tokens.clone()
    before[:, -1] = False
    full, cut = (relation(tokens=given, causal=True) for given in (tokens, before))
    later = vectors(4, 0)
    later[:, -1] += 1.0
    pair, teacher = (later, vectors(4, 1)), (vectors(8, 10), vectors(8, 11))

    torch.testing.assert_close(minilm_relation(pair, teacher, before, heads=HEADS, causal=True), cut)
    assert not torch.allclose(minilm_relation(pair, teacher, tokens, heads=HEADS, causal=True), full)
    assert not torch.allclose(relation(tokens=tokens), full)


def test_a_sentence_without_tokens_is_zero_and_connected() -> None:
    student = (vectors(4, 0).requires_grad_(), vectors(4, 1))

    found = minilm_relation(student, (vectors(8, 10), vectors(8, 11)), torch.zeros(3, 5, dtype=torch.bool), heads=HEADS)
    found.sum().backward()

    assert found.tolist() == [0.0, 0.0, 0.0]
    assert student[0].grad is not None
    assert not student[0].grad.any()


def test_double_precision_passes_gradcheck_and_the_teacher_gets_no_gradient() -> None:
    teacher = (vectors(8, 10).requires_grad_(), vectors(8, 11))

    def value(left: Tensor, right: Tensor) -> Tensor:
        return minilm_relation((left, right), teacher, TOKENS, heads=HEADS)

    assert torch.autograd.gradcheck(value, (vectors(4, 0).requires_grad_(), vectors(4, 1).requires_grad_()))
    value(vectors(4, 0).requires_grad_(), vectors(4, 1)).sum().backward()
    assert teacher[0].grad is None


def test_half_precision_vectors_of_300_stay_finite() -> None:
    student = ((300 * vectors(4, 0).sign()).half().requires_grad_(), (300 * vectors(4, 1).sign()).half())
    teacher = ((300 * vectors(8, 10).sign()).half(), (300 * vectors(8, 11).sign()).half())

    found = minilm_relation(student, teacher, TOKENS, heads=HEADS)
    found.sum().backward()

    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert student[0].grad is not None
    assert student[0].grad.isfinite().all()


def test_relation_heads_that_do_not_divide_name_the_remedy() -> None:
    with pytest.raises(MismatchError, match=r"relation_heads=3 does not divide the width 8.*MiniLM\(relation_heads="):
        relation(heads=3)


@pytest.mark.parametrize(("student", "teacher"), [(1, 3), (3, 1)])
def test_another_number_of_tokens_raises_instead_of_broadcasting(student: int, teacher: int) -> None:
    with pytest.raises(MismatchError, match="Both models must see the same tokens"):
        minilm_relation(
            (vectors(4, 0, student), vectors(4, 1, student)),
            (vectors(8, 10, teacher), vectors(8, 11, teacher)),
            torch.ones(3, student, dtype=torch.bool),
            heads=HEADS,
        )


def test_one_sentence_against_three_raises() -> None:
    with pytest.raises(MismatchError, match="Both models must see the same tokens"):
        minilm_relation((vectors(4, 0), vectors(4, 1)), (vectors(8, 10)[:1], vectors(8, 11)[:1]), TOKENS, heads=HEADS)


def test_queries_and_keys_of_unequal_width_name_the_remedy() -> None:
    """Several queries may share a key."""
    with pytest.raises(MismatchError, match=r"needs one width.*'qq', 'kk', 'vv'"):
        minilm_relation((vectors(4, 0), vectors(2, 1)), (vectors(8, 10), vectors(4, 11)), TOKENS, heads=HEADS)


def taps(width: int, layer: int, seed: int) -> dict[str, Tensor]:
    return {f"{letter}:{layer}": heads_of(width, seed + place) for place, letter in enumerate("qkv")}


def test_the_objective_weighs_its_relations_and_names_them() -> None:
    objective = MiniLM(relations=("qk", "vv"), weights=(0.5, 2.0), relation_heads=4, teacher_layer=1)
    needs = objective.needs(sizes(2), sizes(3))
    student, teacher = taps(8, -1, 0), taps(16, 1, 10)

    found = objective(signals(student, teacher, TOKENS), step())

    def plain(left: str, right: str) -> Tensor:
        s = [joined_heads(student[f"{letter}:-1"]) for letter in (left, right)]
        t = [joined_heads(teacher[f"{letter}:1"]) for letter in (left, right)]
        return minilm_relation((s[0], s[1]), (t[0], t[1]), TOKENS, heads=4)

    assert needs.student == set(student)
    assert needs.teacher == set(teacher)
    assert (needs.mean_over, needs.same_tokens) == ("examples", False)
    torch.testing.assert_close(found, {"qk": 0.5 * plain("q", "k"), "vv": 2.0 * plain("v", "v")})


def test_it_asks_for_what_its_relations_use_and_no_more() -> None:
    needs = MiniLM(relations=("vv",), weights=(1.0,)).needs(sizes(2), sizes(3))

    assert (needs.student, needs.teacher) == ({"v:-1"}, {"v:-1"})


def test_taps_of_another_objective_are_not_taken_for_its_own() -> None:
    """The signals hold the union of what all objectives of a run asked for."""
    objective = MiniLM(relations=("qq",), weights=(1.0,), relation_heads=HEADS)
    objective.needs(sizes(2), sizes(3))
    student, teacher = {"q:-1": heads_of(8, 0)}, {"q:-1": heads_of(16, 10)}
    alone = objective(signals(student, teacher, TOKENS), step())

    both = objective(
        signals(student | {"q:0": heads_of(8, 5), "k:-1": heads_of(8, 6)}, teacher | {"q:1": heads_of(16, 7)}, TOKENS),
        step(),
    )

    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    "kinds", [("causal", "causal"), ("tokens", "causal"), ("causal", "none"), ("tokens", "tokens")]
)
def test_a_causal_model_is_compared_causally(kinds: Any) -> None:
    objective = MiniLM(relations=("qq",), weights=(1.0,), relation_heads=HEADS)
    objective.needs(sizes(2, kinds[0]), sizes(3, kinds[1]))
    q_s, q_t = heads_of(8, 0), heads_of(16, 10)

    found = objective(signals({"q:-1": q_s}, {"q:-1": q_t}, TOKENS), step())["qq"]

    s, t = joined_heads(q_s), joined_heads(q_t)
    torch.testing.assert_close(found, minilm_relation((s, s), (t, t), TOKENS, heads=HEADS, causal="causal" in kinds))


@pytest.mark.parametrize("pair", [(0, 4), (4, 0)])
def test_a_model_without_layers_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(MismatchError, match="minilm: both models must be transformers"):
        MiniLM().needs(sizes(pair[0]), sizes(pair[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relations": ("qq",)}, "1 relations need as many weights"),
        ({"relations": (), "weights": ()}, "0 relations need as many weights"),
        ({"relations": ("qx",), "weights": (1.0,)}, r"pairs of q, k and v such as 'qq', got \['qx'\]"),
        ({"relations": ("q",), "weights": (1.0,)}, r"got \['q'\]"),
        ({"relations": ("qq", "qq"), "weights": (1.0, 2.0)}, "a relation appears twice"),
        ({"relation_heads": 0}, "needs relation_heads ≥ 1"),
        ({"weights": (1.0, -1.0, 1.0)}, "weights 0"),
        ({"weights": (1.0, math.nan, 1.0)}, "weights 0"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^minilm: .*{message}"):
        MiniLM(**settings)
