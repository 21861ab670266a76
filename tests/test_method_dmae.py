"""DMAE: the same visible patches, the right blocks, a teacher that stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_compress_plugins.vision.dmae import DMAE, block_at, dmae, grid_positions, masked_student, patch_noise
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from hf_compress import DistillCallback, export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Signals, Step

CASE = testing.Case("dmae", "image-feature-extraction")


def test_three_quarters_of_the_depth() -> None:
    assert [block_at(None, depth, "student") for depth in (24, 12, 6, 3, 2, 1)] == [17, 8, 3, 1, 0, 0]
    assert block_at(2, 3, "student") == 2
    with pytest.raises(MismatchError, match=r"blocks 0 … 2, asked for 3"):
        block_at(3, 3, "teacher")


def test_by_hand() -> None:
    """Orthogonal unit tokens of two dimensions are 1 apart in each; a scale makes no difference with normalisation."""
    student, teacher = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])
    assert dmae(student, teacher, distance="L1", normalise=True).tolist() == [1.0]
    assert dmae(student, teacher, distance="L2", normalise=False).tolist() == [(9 + 25) / 2]
    with pytest.raises(MismatchError, match="one shape"):
        dmae(student, teacher[..., :1], distance="L1", normalise=True)


def test_noise_is_drawn_for_each_image() -> None:
    noise = patch_noise(3, 16, torch.Generator().manual_seed(0))
    assert noise.shape == (3, 16)
    assert not torch.equal(noise[0], noise[1])


class Kept(DMAE):
    """Keeps what both models gave."""

    __module__ = DMAE.__module__
    seen: Signals

    def forward(self, signals: Signals, step: Step) -> Tensor:
        type(self).seen = signals
        return super().forward(signals, step)


def test_both_models_see_the_same_patches_and_the_teacher_stops(tmp_path: Path) -> None:
    trainer, teacher = testing.trainer(CASE, tmp_path, objective=Kept(), learning_rate=0.0)
    calls = [0, 0]
    teacher.vit.layers[2].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    teacher.decoder.register_forward_pre_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
    trainer.train()

    seen = Kept.seen
    assert calls == [0, 0]
    inputs: dict[str, Any] = dict(seen.inputs)
    assert inputs["noise"].shape == (4, 16)
    for model, taps, block in ((teacher, seen.teacher, 2), (trainer.model, seen.student, 1)):
        with torch.no_grad():
            states = model.eval()(**inputs, output_hidden_states=True).hidden_states
        (state,) = taps.values()
        torch.testing.assert_close(state.detach(), states[block], rtol=1e-4, atol=1e-5)
        assert state.shape[1] == 4 + 1
    assert "noise" not in trainer.model.config.to_dict()


def test_the_student_s_own_reconstruction_is_the_task(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(log["task_loss"] + log["distill_loss"], rel=1e-5)
    assert log["task_loss"] > 0
    assert log["distill/dmae"] == pytest.approx(log["distill_loss"])


def test_without_a_projector_nothing_is_learned_beside_the_student(tmp_path: Path) -> None:
    config = ViTMAEConfig(
        **{k: v for k, v in testing.models(CASE.task)[0].config.to_dict().items() if k != "transformers_version"}
    )
    teacher = ViTMAEForPreTraining(config)
    trainer, _ = testing.trainer(CASE, tmp_path)
    callback = DistillCallback(teacher, DMAE(projector=False))
    made = type(trainer)(
        model=testing.models(CASE.task)[0], args=trainer.args, train_dataset=trainer.train_dataset,
        data_collator=testing.collate, callbacks=[callback],
    )  # fmt: skip
    assert not list(callback.run.distiller.parameters())
    made.train()
    other, _ = testing.trainer(CASE, tmp_path, objective=DMAE(projector=False))
    with pytest.raises(MismatchError, match="Use the projector"):
        other.train()


def test_the_saved_encoder_loads_alone(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded, report = ViTMAEModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"]
    assert isinstance(loaded.layers, nn.ModuleList)


@pytest.mark.parametrize("changed", [{"mask_ratio": 0.5}, {"patch_size": 4}])
def test_models_that_would_see_other_patches_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    trainer, teacher = testing.trainer(CASE, tmp_path)
    config = ViTMAEConfig(**(teacher.config.to_dict() | changed))
    with pytest.raises(MismatchError, match=next(iter(changed))):
        type(trainer)(
            model=testing.models(CASE.task)[0], args=trainer.args, train_dataset=trainer.train_dataset,
            callbacks=[DistillCallback(ViTMAEForPreTraining(config), "dmae")],
        )  # fmt: skip


def test_another_distance_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="L1 or L2"):
        DMAE(distance="L3")


def test_the_encoder_classifies_and_exports_with_parity(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    classifier, report = ViTForImageClassification.from_pretrained(
        tmp_path / "student", num_labels=3, output_loading_info=True
    )
    assert all(name.startswith(("classifier", "vit.layernorm")) for name in report["missing_keys"])
    torch.testing.assert_close(classifier.vit.layers[0].mlp.fc1.weight, trainer.model.vit.layers[0].mlp.fc1.weight)
    classifier.save_pretrained(tmp_path / "classifier")
    export_onnx(tmp_path / "classifier")
    assert (tmp_path / "classifier/onnx/model.onnx").exists()


def test_positions_by_hand() -> None:
    """Width 8, two frequencies 1 and 1/100; patch 5 of a grid of 3 stands in column 2, row 1."""
    found = grid_positions(3, 8)
    assert found.shape == (1, 10, 8)
    assert not found[0, 0].any()
    angles = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    expected = torch.cat([wave for place in angles for wave in (place.sin(), place.cos())])
    torch.testing.assert_close(found[0, 6], expected)
    with pytest.raises(ConfigurationError, match="multiple of 4"):
        grid_positions(3, 6)


def test_positions_are_those_of_published_weights() -> None:
    """transformers keeps the layout in which the authors' weights were trained: columns first."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    theirs = build_2d_sinusoidal_position_embedding(height=4, width=4, embed_dim=16, cls_token=True)
    torch.testing.assert_close(grid_positions(4, 16)[0], torch.cat([theirs[..., 8:], theirs[..., :8]], -1))


def test_a_new_student_sees_what_the_teacher_sees_and_knows_where() -> None:
    teacher = testing.models(CASE.task)[1]
    made = masked_student(teacher, config={"hidden_size": 16, "num_hidden_layers": 1})
    assert (made.config.hidden_size, made.config.image_size) == (16, teacher.config.image_size)
    assert made.config.mask_ratio == teacher.config.mask_ratio
    torch.testing.assert_close(made.vit.embeddings.position_embeddings, grid_positions(4, 16))
    torch.testing.assert_close(made.decoder.decoder_pos_embed, grid_positions(4, 16))
    with pytest.raises(MismatchError, match="ViTMAE"):
        masked_student(testing.models("image-classification")[0])


def test_a_student_that_cannot_tell_patches_apart_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for student, reported in ((masked_student(testing.models(CASE.task)[0]), False), (None, True)):
        trainer, teacher = testing.trainer(CASE, tmp_path)
        student = student or testing.models(CASE.task)[0]
        if reported:
            student.vit.embeddings.position_embeddings.data.zero_()
        made = type(trainer)(
            model=student, args=trainer.args, train_dataset=trainer.train_dataset, data_collator=testing.collate,
            callbacks=[DistillCallback(teacher, "dmae")],
        )  # fmt: skip
        caplog.clear()
        made.train()
        assert ("position embeddings are all zero" in caplog.text) == reported
