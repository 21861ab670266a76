"""ACM: modules called on the teacher's inputs, three phases, conditional computation that exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.encoders import acm as module
from hf_compress_plugins.encoders._modeling_acm_vit import ACMBlock
from hf_compress_plugins.encoders.acm import (
    ACM,
    RECIPE,
    acm,
    budget_loss,
    choice_diversity,
    choice_entropy,
    cumulated,
    gate_labels,
    modules,
    spent,
)
from torch import Tensor
from transformers import Trainer

from hf_compress import DistillCallback, export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.stages import Surroundings, run_stages

TASK = "image-classification"


def teacher() -> Any:
    return testing.models(TASK)[0]


def student(**settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return acm(teacher(), config={"learners": 3, "gate_size": 4} | settings)


def surroundings(steps: int = 3, **arguments: Any) -> Surroundings:
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return Surroundings(
        models={"teacher": teacher()},
        data={"train": testing.rows(TASK, 8)},
        arguments=defaults | arguments,
        data_collator=testing.collate,
        progress=False,
    )


def run(folder: Path, method: Any, steps: int = 1, **settings: Any) -> Trainer:
    plain, _ = testing.trainer(testing.Case("acm", TASK), folder, objective=ACM(phase="learners"), max_steps=steps)
    made = Trainer(
        model=student(),
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher(), method, **settings)],
    )
    made.train()
    return made


def test_learner_k_gets_the_gradient_of_choice_k_alone() -> None:
    each = torch.ones(1, 3, 2, requires_grad=True)
    torch.testing.assert_close(cumulated(each, detach=True)[0, :, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))
    cumulated(each, detach=True)[0, 3].sum().backward()
    assert each.grad is not None
    assert each.grad[0, :, 0].tolist() == [0.0, 0.0, 1.0]
    each.grad = None
    cumulated(each, detach=False)[0, 3].sum().backward()
    assert each.grad[0, :, 0].tolist() == [1.0, 1.0, 1.0]


def test_labels_stop_where_a_learner_no_longer_pays() -> None:
    errors = torch.tensor([[4.0, 2.0, 1.9, 0.1], [4.0, 2.0, 1.0, 0.5], [4.0, 2.0, 0.0, 0.0]])
    assert gate_labels(errors, factor=1.2).tolist() == [2, 3, 3]


def test_choices_by_hand() -> None:
    """Two samples, one takes all of three learners and one none: half of the cost, no entropy, -2 · ½ · |¾ - 0|."""
    choice = torch.zeros(2, 4, 4)
    choice[0, :, 3] = choice[1, :, 0] = 1.0
    assert spent([choice], [7.0], [0]).item() == pytest.approx(0.5)
    assert choice_entropy([choice]).item() == pytest.approx(0.0)
    assert choice_diversity([choice], [0]).item() == pytest.approx(-0.75)
    assert choice_entropy([torch.full((1, 2, 4), 0.25)]).item() == pytest.approx(-1.0)


def test_a_module_that_needs_a_learner_counts_from_one() -> None:
    """Choices 1 and 2 of two learners of cost 5, and 0 and 2 of cost 10: (7.5 + 10) / 30; diversity over both."""
    one, two = torch.zeros(2, 1, 2), torch.zeros(2, 1, 3)
    one[0, 0, 0] = one[1, 0, 1] = two[0, 0, 0] = two[1, 0, 2] = 1.0
    assert spent([one, two], [5.0, 10.0], [1, 0]).item() == pytest.approx(17.5 / 30)
    assert choice_diversity([one, two], [1, 0]).item() == pytest.approx(-((1 + 2 / 3) / 2 - 1 / 4))


@pytest.mark.parametrize(("distance", "value"), [("absolute", 0.1), ("squared", 0.01), ("squared and scaled", 100.0)])
def test_the_distance_from_the_budget(distance: Any, value: float) -> None:
    assert budget_loss(torch.tensor(0.4), 0.5, distance=distance).item() == pytest.approx(value)


def test_projections_cost_together_what_they_did() -> None:
    """Width 48: (48² + 48) / (2 · 48 + 1) / 3 = 8.08, so 8; at least one learner runs, and no activation."""
    block = student().vit.layers[0].attention.q_proj
    assert (block.size, block.cost, block.lowest, block.gate[-1].out_features) == (8, 8 * 96, 1, 3)
    x = torch.randn(2, 3, 48)
    zero = block.each(torch.zeros(2, 3, 48))
    torch.testing.assert_close(block.each(2 * x) - zero, 2 * (block.each(x) - zero), rtol=1e-4, atol=1e-5)
    gelu = student(projection_activation="gelu").vit.layers[0].attention.q_proj
    zero = gelu.each(torch.zeros(2, 3, 48))
    assert not torch.allclose(gelu.each(2 * x) - zero, 2 * (gelu.each(x) - zero), rtol=1e-2)


@pytest.mark.parametrize("part", ["mlp", "attention.q_proj"])
def test_the_gate_chooses_how_many_learners_a_token_gets(part: str) -> None:
    block = student().eval().vit.layers[0].get_submodule(part)
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        chosen = block.gate(x).argmax(-1) + block.lowest
        every = cumulated(block.each(x), detach=False)
        expected = every.gather(2, chosen[..., None, None].expand(-1, -1, 1, 48)).squeeze(2)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        block.gate[-1].bias[0] += 1e3
        torch.testing.assert_close(block(x), every[..., block.lowest, :], rtol=1e-4, atol=1e-5)


def test_feed_forward_blocks_alone_where_asked() -> None:
    names = {name for name, module in student(projections=False).named_modules() if hasattr(module, "learners")}
    assert names == set(modules(2, projections=False)) == {f"vit.layers.{layer}.mlp" for layer in range(2)}
    assert len(modules(2, projections=True)) == 10


def test_the_student_has_the_teacher_s_weights_but_for_its_blocks() -> None:
    own, theirs = student().state_dict(), teacher().state_dict()
    for name, weight in theirs.items():
        assert ".mlp." in name or "_proj." in name or torch.equal(own[name], weight), name
    with pytest.raises(MismatchError, match="ViTForImageClassification"):
        acm(testing.models("text-classification")[0])


def test_more_learners_come_nearer_to_the_teacher(tmp_path: Path) -> None:
    made = run_stages(
        {"stages": RECIPE["stages"][:1]}, student(), tmp_path, surroundings(150, learning_rate=5e-3)
    ).eval()
    batch = testing.collate(testing.rows(TASK, 8))["pixel_values"]
    for name in ("vit.layers.0.mlp", "vit.layers.0.attention.q_proj", "vit.layers.1.attention.o_proj"):
        inputs: list[Tensor] = []
        model = teacher().eval()
        model.get_submodule(name).register_forward_hook(lambda _, args, out, kept=inputs: kept.extend([args[0], out]))
        with torch.no_grad():
            model(batch)
            every = cumulated(made.get_submodule(name).each(inputs[0]), detach=False)
        errors = (every - inputs[1][..., None, :]).square().mean((0, 1, 3)).tolist()
        assert errors[3] < errors[1] < errors[0], name


def test_each_phase_trains_its_part_on_the_teacher_s_blocks(tmp_path: Path) -> None:
    made = run_stages(RECIPE, student(), tmp_path, surroundings())
    start = student().state_dict()
    loaded = [type(made).from_pretrained(tmp_path / name).state_dict() for name in ("0-learners", "1-gates")]
    for before, after, part in ((start, loaded[0], ".learners."), (loaded[0], loaded[1], ".gate.")):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all(part in name for name in changed)
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "mlp"} <= {
            piece for name in changed for piece in name.split(".")
        }
    third = made.state_dict()
    assert any(not torch.equal(loaded[1][name], third[name]) for name in third if "layernorm" in name)
    assert [stage["methods"][0]["settings"]["phase"] for stage in made.config.compression["before"]] == [
        "learners",
        "gates",
    ]


def test_the_budget_is_what_the_gates_learn(tmp_path: Path) -> None:
    method = ACM(phase="joint", budget=0.2, budget_weight=50.0, entropy_weight=0.0, diversity_weight=0.0)
    made = run(tmp_path, method, steps=60)
    logs = [entry["distill/acm.budget"] for entry in made.state.log_history if "distill/acm.budget" in entry]
    assert sum(logs[-10:]) < 0.6 * sum(logs[:10])


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = run_stages(RECIPE, student(), tmp_path / "whole", surroundings(4, **settings))
    again = run_stages(RECIPE, student(), tmp_path / "again", surroundings(4, **settings))
    assert testing.weights_hash(whole) == testing.weights_hash(again)


def test_it_exports_with_parity_and_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    made = student().eval()
    made.save_pretrained(tmp_path / "student")
    export_onnx(tmp_path / "student")
    assert (tmp_path / "student/onnx/model.onnx").exists()
    alone = output_of(tmp_path / "student", "AutoModelForImageClassification", "model(torch.ones(1, 3, 8, 8)).logits")
    with torch.no_grad():
        own = made(torch.ones(1, 3, 8, 8)).logits
    torch.testing.assert_close(alone, own)


def test_one_number_of_learners_for_all_tokens_is_kept_in_the_folder(tmp_path: Path) -> None:
    """None in feed-forward blocks, where the residual remains, leaves one in projections."""
    made = student().eval()
    made.save_pretrained(tmp_path / "gates")
    for taken in (0, 2):
        for block in made.modules():
            if isinstance(block, ACMBlock):
                block.fixed = max(taken, block.lowest)
        loaded = type(made).from_pretrained(tmp_path / "gates", taken=taken).eval()
        loaded.save_pretrained(tmp_path / "fixed")
        again = type(made).from_pretrained(tmp_path / "fixed").eval()
        with torch.no_grad():
            wanted = made(torch.ones(1, 3, 8, 8)).logits
            torch.testing.assert_close(loaded(torch.ones(1, 3, 8, 8)).logits, wanted)
            torch.testing.assert_close(again(torch.ones(1, 3, 8, 8)).logits, wanted)


def test_a_student_of_another_kind_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    plain, _ = testing.trainer(testing.Case("acm", TASK), tmp_path, objective=ACM(phase="learners"))
    with pytest.raises(MismatchError, match=r"must come from acm"):
        plain.train()
    for settings in ({"phase": "all"}, {"budget": 2.0}, {"factor": 0.5}, {"budget_distance": "cubed"}):
        with pytest.raises(ConfigurationError, match="acm"):
            ACM(**settings)


@pytest.mark.parametrize(
    "name", ["modules", "cumulated", "gate_labels", "spent", "budget_loss", "choice_entropy", "choice_diversity"]
)
def test_each_function_is_reached_by_the_phases(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run_stages(RECIPE, student(), tmp_path, surroundings(1))


@pytest.mark.parametrize("phase", ["learners", "gates"])
def test_a_phase_s_loss_is_the_mean_over_all_modules_on_the_teacher_s_inputs(phase: Any, tmp_path: Path) -> None:
    """Projections have neither a choice of no learner nor a label for it."""
    plain, _ = testing.trainer(testing.Case("acm", TASK), tmp_path, objective=ACM(phase="learners"))
    plain.args.learning_rate = 0.0
    made = Trainer(
        model=student(), args=plain.args, train_dataset=plain.train_dataset, data_collator=testing.collate,
        callbacks=[DistillCallback(teacher(), ACM(phase=phase))],
    )  # fmt: skip
    made.train()
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]

    model, own, seen = teacher().eval(), student(), dict[str, Any]()
    for name in modules(2, projections=True):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    values = []
    with torch.no_grad():
        model(testing.collate(testing.rows(TASK))["pixel_values"])
        for name, (given, wanted) in seen.items():
            block, least = own.get_submodule(name), int("proj" in name)
            parts = torch.stack([block.each(given)[..., :k, :].sum(-2) - wanted for k in range(4)], -2)
            if phase == "learners":
                values.append(parts[..., least:, :].square().mean())
                continue
            labels = gate_labels(parts.norm(dim=-1), factor=1.2)
            chances = block.gate(given).log_softmax(-1)
            values.append(-chances.gather(-1, labels[..., None] - least).mean())
    assert len(values) == 10
    assert log[f"distill/acm.{phase}"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)
