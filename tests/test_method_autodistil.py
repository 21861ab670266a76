"""AutoDistil: relations by hand, students that are parts of one model, a step's gradient, the search and its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from datasets import Dataset
from hf_compress_plugins.encoders import _modeling_autodistil as modeling
from hf_compress_plugins.encoders import autodistil as module
from hf_compress_plugins.encoders._super_network import (
    LETTERS,
    Architecture,
    Student,
    extract,
    kept_layers,
    own_sizes,
    parameters,
    top_left,
)
from hf_compress_plugins.encoders.autodistil import (
    AutoDistil,
    AutoDistilConfig,
    architectures,
    autodistil,
    relation_distance,
    sandwich,
    search,
    space_of,
    subspace,
)
from prepared import PREPARED
from stub import GradientKeeper
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    Trainer,
)

from hf_compress import export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError, UnknownNameError
from hf_compress.parts import Budget, Ranking
from hf_compress.taps import Taps, joined_heads, watching

TASK = "feature-extraction"
CASE = testing.Case("autodistil", TASK, **PREPARED["autodistil"])
SETTINGS: dict[str, Any] = {"layers": (1, 2), "heads": (2, 3), "hidden": (24, 36), "ratios": (0.5, 1.0)}
"""Of heads of 12: 2 · 12 = 24 and 3 · 12 = 36 are stock BERTs, the two others are not."""
LARGE = Budget(parameters=10**9)


def super_lm(seed: int = 0) -> PreTrainedModel:
    """Width 48 with four heads, two layers, in eval mode."""
    model: PreTrainedModel = testing.models(TASK)[seed].eval()
    return model


def batch() -> dict[str, Tensor]:
    return testing.collate(testing.rows(TASK))


def vectors(model: Any, layer: int = -1) -> dict[str, Tensor]:
    """Queries, keys and values of a layer on the batch."""
    taps = Taps(model, {f"{letter}:{layer}" for letter in LETTERS}, model.config.num_hidden_layers)
    with watching(taps):
        output = model(**batch())
    found = {name[0]: joined_heads(value) for name, value in taps.read(output).items()}
    taps.remove()
    return found


def distance(student: Any, teacher: Any, **settings: Any) -> Tensor:
    """(batch,)"""
    own, theirs, real = vectors(student), vectors(teacher), batch()["attention_mask"].bool()
    return torch.stack([relation_distance(own[a], theirs[a], real, heads=4, **settings) for a in LETTERS]).sum(0)


# ---------------------------------------------------------------------- mathematics


def test_relations_by_hand() -> None:
    """Two tokens of width 1. Scores 1, 2, 2, 4 against none: 25 / 4. Softmax of ln 3 against ½: twice 1/16, by 4."""
    real, none = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, 1)
    given = torch.tensor([[[1.0], [2.0]]])
    assert relation_distance(given, none, real, heads=1, softmax=False).item() == pytest.approx(6.25)
    given = torch.tensor([[[0.0], [math.sqrt(math.log(3.0))]]])
    assert relation_distance(given, none, real, heads=1).item() == pytest.approx(1 / 32)
    wide = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])  # a head of width 4: 4 / √4, in one of 4 pairs
    assert relation_distance(wide, wide * 0, real, heads=1, softmax=False).item() == pytest.approx(1.0)
    cut = torch.cat([wide, torch.full((1, 2, 1), 7.0)], -1)  # two heads of width 2; the fifth entry is cut off
    assert relation_distance(cut, cut * 0, real, heads=2, softmax=False).item() == pytest.approx(2.0 / 4)


@pytest.mark.parametrize("softmax", [True, False])
def test_padding_is_left_out_or_counts_as_in_the_authors_code(softmax: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(2, 5, 12, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    real = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    whole = torch.ones(1, 3, dtype=torch.bool)
    settings: dict[str, Any] = {"heads": 3, "softmax": softmax}
    value = relation_distance(own, theirs, real, **settings)
    torch.testing.assert_close(value[:1], relation_distance(own[:1, :3], theirs[:1, :3], whole, **settings))
    assert value[1] == 0.0
    spoilt = own.detach().masked_fill(~real[..., None], math.nan).requires_grad_()
    again = relation_distance(spoilt, theirs, real, **settings)
    torch.testing.assert_close(again, value)
    assert torch.autograd.grad(again.sum(), spoilt)[0].isfinite().all()
    value.sum().backward()
    assert theirs.grad is None
    assert own.grad is not None
    assert own.grad[0, :3].abs().min() > 0
    assert not own.grad[0, 3:].any()
    counted = relation_distance(own, theirs, real, masking="added", **settings)[0]
    every = relation_distance(own, theirs, torch.ones_like(real), masking="added", **settings)[0]
    if softmax:  # all five rows, over three keys
        part = own[:1], theirs[:1]
        scores = [module.relation_scores(v, heads=3)[..., :3].softmax(-1) for v in part]
        expected = (scores[0] - scores[1]).square().sum() / (3 * 25)
        torch.testing.assert_close(counted, expected)
    else:  # what is added cancels
        torch.testing.assert_close(counted, every, rtol=1e-9, atol=1e-9)


def test_the_distance_is_float64_and_differentiable_where_asked() -> None:
    draw = torch.Generator().manual_seed(1)
    own, theirs = (torch.randn(1, 4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    real = torch.tensor([[True, True, True, False]])
    own.requires_grad_()
    for softmax in (True, False):
        assert torch.autograd.gradcheck(
            lambda v, s=softmax: relation_distance(v, theirs, real, heads=2, softmax=s), (own,)
        )


def test_layers_and_blocks() -> None:
    assert kept_layers(4, 12) == [0, 3, 6, 9]
    assert kept_layers(9, 12) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert kept_layers(7, 12) == [0, 1, 3, 5, 6, 8, 10]
    assert top_left(torch.arange(12).view(3, 4), (2, 3)).tolist() == [[0, 1, 2], [4, 5, 6]]
    with pytest.raises(MismatchError, match="no block of"):
        top_left(torch.zeros(3, 4), (4, 4))


def test_a_step_trains_the_largest_the_smallest_and_some_at_random() -> None:
    every = architectures(**SETTINGS)
    assert (every[0], every[-1]) == (Architecture(1, 2, 24, 12), Architecture(2, 3, 36, 36))
    assert len(set(every)) == 16
    steps = [sandwich(every, draws=2, seed=3, step=step) for step in range(40)]
    assert {(step["largest"], step["smallest"]) for step in steps} == {(every[-1], every[0])}
    assert {step[f"random_{place}"] for step in steps for place in (1, 2)} == {*every}
    assert sandwich(every, draws=2, seed=3, step=5) == steps[5]
    assert [sandwich(every, draws=2, seed=4, step=step) for step in range(40)] != steps
    assert sandwich(every[:1], draws=2, seed=0, step=0) == {"alone": every[0]}


def test_spaces() -> None:
    tiny = subspace("tiny")
    assert tiny["hidden"] == (128, 160, 192, 224)
    assert tiny["ratios"] == pytest.approx((2.0, 2.5, 3.0, 3.5))
    with pytest.raises(UnknownNameError, match="sub-space"):
        subspace("huge")
    around = space_of(AutoDistilConfig(), super_lm().config)
    assert around[-1] == own_sizes(super_lm().config)
    assert {sizes.num_attention_heads for sizes in around} == {3, 4}
    assert {sizes.hidden_size for sizes in around} == {41, 43, 46, 48}
    with pytest.raises(MismatchError, match="cannot hold"):
        space_of(AutoDistilConfig(layers=(2, 3)), super_lm().config)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": ()},
        {"heads": (3, 2)},
        {"hidden": (0, 8)},
        {"ratios": (2.0, 2.0)},
        {"random_students": -1},
        {"relation_heads": 0},
        {"masking": "none"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="autodistil"):
        AutoDistil(**settings)


def test_what_does_not_fit_is_refused() -> None:
    real = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(MismatchError, match="same tokens"):
        relation_distance(torch.ones(2, 3, 12), torch.ones(2, 4, 12), real, heads=12)
    with pytest.raises(MismatchError, match="relation_heads=12"):
        relation_distance(torch.ones(2, 3, 8), torch.ones(2, 3, 8), real, heads=12)
    with pytest.raises(MismatchError, match="got ViTForImageClassification"):
        autodistil(testing.models("image-classification")[0])
    with pytest.raises(MismatchError, match="needs a BERT"):
        space_of(AutoDistilConfig(), T5Config())
    with pytest.raises(UnknownNameError, match="num_layers"):
        autodistil(super_lm(), config={"num_layers": 2})
    with pytest.raises(MismatchError, match="no block of"):
        autodistil(super_lm(), config={"hidden_size": 60})


# ---------------------------------------------------------------------- parts of one model


def test_a_student_inside_is_the_student_taken_out() -> None:
    """Its queries, keys and values, of stock classes and of ours, taken out of ours again too."""
    model = super_lm()
    for sizes in architectures(**SETTINGS):
        small = extract(model, sizes)
        plain = sizes.num_attention_heads * 12 == sizes.hidden_size
        assert type(small) is (BertModel if plain else modeling.AutoDistilBertModel)
        assert own_sizes(small.config) == sizes
        assert small.num_parameters() == parameters(model, sizes)
        expected = vectors(small)
        for letter, value in Student(model, sizes).vectors(model, batch()).items():
            torch.testing.assert_close(value, expected[letter])
        assert expected["q"].shape[-1] == 12 * sizes.num_attention_heads
    odd = extract(model, Architecture(2, 3, 40, 40))
    again, once = (extract(whole, Architecture(1, 2, 24, 12)) for whole in (odd, model))
    torch.testing.assert_close(vectors(again), vectors(once))


def test_the_layers_of_a_student_are_spread_over_the_super_network() -> None:
    torch.manual_seed(0)
    whole = BertModel(BertConfig(**super_lm().config.to_dict() | {"num_hidden_layers": 4}))
    small: Any = extract(whole, own_sizes(whole.config)._replace(num_hidden_layers=2))
    for own, other in ((0, 0), (1, 2)):  # floor(1 · 4 / 2) = 2
        theirs = whole.encoder.layer[other].state_dict()
        torch.testing.assert_close(small.encoder.layer[own].state_dict(), theirs, rtol=0, atol=0)
    assert small.config.compression_start.startswith("layers 0, 2 of 4, num_attention_heads 4 of 4")


def test_a_student_runs_in_the_mode_of_the_super_network() -> None:
    model = super_lm()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    model.config.hidden_dropout_prob = 0.5
    student, sizes = Student(model, Architecture(2, 3, 24, 12)), model.eval()
    first, second = (student.vectors(sizes, batch())["q"] for _ in range(2))
    assert torch.equal(first, second)
    first, second = (student.vectors(model.train(), batch())["q"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "token-classification"])
def test_heads_come_along(task: str, tmp_path: Path) -> None:
    whole = testing.models(task)[0].eval()
    small = extract(whole, Architecture(2, 3, 40, 20))
    assert type(small).__name__ == f"AutoDistil{type(whole).__name__}"
    assert small.num_parameters() == parameters(whole, own_sizes(small.config))
    small.save_pretrained(tmp_path / "student")
    loaded, report = type(small).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(**testing.collate(testing.rows(task))), small(**testing.collate(testing.rows(task)))
        )


def test_the_folder_loads_alone_takes_a_head_and_exports_with_parity(tmp_path: Path) -> None:
    small = extract(super_lm(), Architecture(1, 3, 24, 24))
    small.save_pretrained(tmp_path / "student")
    with torch.no_grad():
        own = small(torch.ones(1, 3, dtype=torch.long)).last_hidden_state
    headed = f"transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'student')!r}, "
    headed += "trust_remote_code=True).eval().bert"
    call = f"torch.cat([m(torch.ones(1, 3, dtype=torch.long)).last_hidden_state for m in (model, {headed})])"
    torch.testing.assert_close(output_of(tmp_path / "student", "AutoModel", call), torch.cat([own, own]))
    assert type(AutoModel.from_pretrained(tmp_path / "student")) is modeling.AutoDistilBertModel
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert type(tuned) is modeling.AutoDistilBertForSequenceClassification
    export_onnx(tmp_path / "student")
    assert (tmp_path / "student/onnx/model.onnx").exists()


def test_a_super_network_is_cut_from_the_teacher() -> None:
    teacher = super_lm(1)
    teacher.config.compression = {"task": "of its own training"}
    made: Any = autodistil(teacher, config={"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 60})
    assert own_sizes(made.config) == Architecture(2, 3, 60, 96)
    assert made.encoder.layer[0].attention.self.query.weight.shape == (72, 60)
    assert made.config.compression_start.endswith("of the teacher")
    assert not hasattr(made.config, "compression")
    assert testing.weights_hash(autodistil(teacher)) == testing.weights_hash(teacher)


# ---------------------------------------------------------------------- a step and the search


def trained(folder: Path, **settings: Any) -> tuple[Trainer, PreTrainedModel, dict[str, Tensor]]:
    """One step from `super_lm`, and its gradient."""
    keeper = GradientKeeper()
    made, teacher = testing.trainer(
        CASE, folder, objective=AutoDistil(**SETTINGS), callbacks=(keeper,), dtype=torch.float64, **settings
    )
    made.train()
    return made, teacher.eval(), keeper.gradients[0]


def test_a_step_adds_up_the_students_gradients_in_their_places(tmp_path: Path) -> None:
    """Losses and gradients of one step are those of the four students taken out and put side by side."""
    made, teacher, gradient = trained(tmp_path, learning_rate=0.0)
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    model: Any = super_lm().double()
    expected = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    total = 0.0
    for name, sizes in sandwich(architectures(**SETTINGS), draws=2, seed=0, step=0).items():
        student = extract(model, sizes)
        value = distance(student, teacher).mean()
        value.backward()
        assert log[f"distill/autodistil.{name}"] == pytest.approx(value.item(), rel=1e-6)
        total += value.item()
        for where, own in student.named_parameters():
            if own.grad is not None:  # of one layer that is layer 0; of two both
                top_left(expected[where], own.shape).add_(own.grad)
    assert log["loss"] == pytest.approx(total, rel=1e-6)
    assert {name for name, value in expected.items() if value.any()} == {n for n, g in gradient.items() if g.any()}
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12)
    query = gradient["encoder.layer.1.attention.self.query.weight"]
    assert query[:36, :36].any()
    assert not query[36:].any()
    assert not query[:, 36:].any()


def test_a_step_draws_by_its_number_and_the_seed_and_an_evaluation_draws_none(tmp_path: Path) -> None:
    """At a learning rate of 0 two evaluations agree."""
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.0}
    made, teacher = testing.trainer(
        CASE,
        tmp_path,
        objective=AutoDistil(**SETTINGS, seed=3),
        dtype=torch.float64,
        give=lambda _: {"eval_dataset": Dataset.from_list(testing.rows(TASK))},
        **settings,
    )
    made.train()
    logs = made.state.log_history
    trained_ = [entry for entry in logs if "distill/autodistil.random_1" in entry]
    for step, entry in enumerate(trained_):
        for name, sizes in sandwich(architectures(**SETTINGS), draws=2, seed=3, step=step).items():
            value = distance(extract(super_lm().double(), sizes), teacher.eval()).mean()
            assert entry[f"distill/autodistil.{name}"] == pytest.approx(value.item(), rel=1e-6)
    assert len(trained_) == 2
    first, second = (entry["eval_distill_loss"] for entry in logs if "eval_distill_loss" in entry)
    ends = trained_[0]["distill/autodistil.largest"] + trained_[0]["distill/autodistil.smallest"]
    assert first == second == pytest.approx(ends, rel=1e-5)


def test_a_search_that_is_not_told_the_space_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not say that it was trained as a SuperLM"):
        found(super_lm())


def test_the_largest_student_is_the_model_s_own_forward(tmp_path: Path) -> None:
    own = {"layers": (1, 2), "heads": (3, 4), "hidden": (48,), "ratios": (1.0,), "random_students": 0}
    made, teacher = testing.trainer(CASE, tmp_path, objective=AutoDistil(**own), learning_rate=0.0)
    ran, original = list[int](), Student.vectors

    def counted(student: Student, *given: Any) -> dict[str, Tensor]:
        ran.append(student.model.config.num_hidden_layers)
        return original(student, *given)

    with mock.patch.object(Student, "vectors", counted):
        made.train()
    assert ran == [1]
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    expected = distance(super_lm(), teacher.eval()).mean().item()
    assert log["distill/autodistil.largest"] == pytest.approx(expected, rel=1e-5)


def test_students_run_in_the_precision_of_the_super_network(tmp_path: Path) -> None:
    dtypes, original = set[torch.dtype](), Student.vectors

    def watched(*given: Any) -> dict[str, Tensor]:
        made = original(*given)
        dtypes.add(made["q"].dtype)
        return made

    with mock.patch.object(Student, "vectors", watched):
        testing.trainer(CASE, tmp_path, objective=AutoDistil(**SETTINGS), bf16=True)[0].train()
    assert dtypes == {torch.bfloat16}


def found(student: PreTrainedModel, budget: Budget = LARGE, **settings: Any) -> Ranking:
    data = [batch() | {"labels": torch.zeros(4)}, testing.collate(testing.rows(TASK, 2, seed=5))]
    return search(**{"teacher": super_lm(1), "data": data, "budget": budget, "student": student} | settings)


def test_the_search_drops_nothing_out_and_restores_modes() -> None:
    for who in ("student", "teacher"):
        models = {"student": super_lm(), "teacher": super_lm(1)}
        models[who].config.hidden_dropout_prob = 0.5
        for part in models[who].train().modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.5
        settings = AutoDistilConfig(layers=(2,), heads=(3,), hidden=(36,), ratios=(1.0,))
        first, second = (found(models["student"], teacher=models["teacher"], config=settings) for _ in range(2))
        assert first.scores == second.scores
        assert all(part.training for part in models[who].modules())


def test_the_search_ranks_all_students_by_their_loss_and_builds_them(tmp_path: Path) -> None:
    made, _, _ = trained(tmp_path, max_steps=2)
    student: Any = made.model.float().eval()
    before = testing.weights_hash(student)
    ranking = found(student)
    assert len(ranking.configs) == 16  # the space of the record
    json.dumps([ranking.configs, ranking.scores])
    assert testing.weights_hash(student) == before
    assert not student.training
    for place in (0, 7, 15):
        small: Any = ranking.build(place).eval()
        assert small.config.to_dict() | ranking.configs[place] == small.config.to_dict()
        own, theirs = Student(small, own_sizes(small.config)), super_lm(1)
        values = []
        for rows in (batch(), testing.collate(testing.rows(TASK, 2, seed=5))):
            given = Student(theirs, own_sizes(theirs.config)).vectors(theirs, rows), own.vectors(small, rows)
            real = rows["attention_mask"].bool()
            values.append(sum(relation_distance(given[1][a], given[0][a], real, heads=4) for a in LETTERS))
        assert -ranking.scores[place] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    record = ranking.build(3).config.compression
    assert record["methods"][0]["name"] == "autodistil"
    assert record["student"]["parameters"] == ranking.build(3).num_parameters()
    assert record["student"]["start"].endswith("of the SuperLM")


def test_limits_of_the_search() -> None:
    model, settings = super_lm(), AutoDistilConfig(**SETTINGS)
    counts = [parameters(model, sizes) for sizes in architectures(**SETTINGS)]
    limit = sorted(counts)[8]
    ranking = found(model, Budget(parameters=limit), config=settings)
    assert len(ranking.configs) == sum(count <= limit for count in counts) == 9
    few = found(model, Budget(parameters=10**9, evaluations=5), config=settings)
    assert len({tuple(sizes.values()) for sizes in few.configs}) == 5
    shallow = found(model, config=settings, allowed=lambda made: made.config.num_hidden_layers == 1)
    assert {sizes["num_hidden_layers"] for sizes in shallow.configs} == {1}
    with pytest.raises(ConfigurationError, match="10 parameters or less"):
        found(model, Budget(parameters=10), config=settings)
    model.get_parameter("encoder.layer.0.attention.self.query.weight").data.fill_(math.nan)
    with pytest.raises(NumericalError, match="held-out loss"):
        found(model, config=settings)
