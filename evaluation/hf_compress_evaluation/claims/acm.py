"""ACM's claim: blocks that spend more on some tokens than on others lose little at half of the cost."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hf_compress_plugins.encoders._modeling_acm_vit import ACMBlock
from hf_compress_plugins.encoders.acm import RECIPE, acm, cumulated, modules, spent
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_compress.stages import Surroundings, run_stages

from . import Claim
from . import _digits as digits

LEARNERS, BUDGET, BATCH = 4, 0.5, 64
STEPS = {"learners": (200, 3e-3), "gates": (100, 1e-2), "joint": (500, 1e-3)}
"""Steps and learning rate of each phase."""
TEACHER_STEPS = 1000
HALVED = "feed-forward half as wide"


def vit(intermediate: int, seed: int) -> ViTForImageClassification:
    """Sixteen tokens of 2 x 2 pixels, four layers of width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=2, num_channels=1, hidden_size=32, intermediate_size=intermediate,
                num_hidden_layers=4, num_attention_heads=4, num_labels=10, initializer_range=0.1,
            )
        )  # fmt: skip


@cache
def teacher() -> ViTForImageClassification:
    """Trained on the training images."""
    return digits.train(vit(128, 100), steps=TEACHER_STEPS, seed=100, learning_rate=2e-3)


def blocks(model: nn.Module) -> list[ACMBlock]:
    """The modules of a student."""
    return [module for module in model.modules() if isinstance(module, ACMBlock)]


def held_out_errors(student: Any) -> list[float]:
    """Squared error on the test images over the output's mean square, with 1 … N learners; mean over modules."""
    model, seen = copy.deepcopy(teacher()).eval(), dict[str, tuple[Tensor, Tensor]]()
    names = modules(4, projections=student.config.projections)
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        model(digits.images()[0][digits.TRAIN :])
        found = []
        for name in names:
            given, wanted = seen[name]
            every = cumulated(student.get_submodule(name).each(given), detach=False)[..., 1:, :]
            errors = (every - wanted[..., None, :]).square().mean((0, 1, 3))
            found.append(errors / wanted.square().mean())
    return torch.stack(found).mean(0).tolist()


def share(student: Any) -> float:
    """Of the blocks' full cost that the gates choose on the test images."""
    made, chosen = blocks(student), list[Tensor]()
    hooks = [block.route.register_forward_hook(lambda *found: chosen.append(found[2])) for block in made]
    with torch.no_grad():
        student.eval()(digits.images()[0][digits.TRAIN :])
    for hook in hooks:
        hook.remove()
    return float(spent(chosen, [float(block.cost) for block in made], [block.lowest for block in made]))


def uniform(student: Any, part: float) -> float:
    """Accuracy with one number of learners for all tokens, between that below and that above the share."""
    below, accuracies = min(int(part * LEARNERS), LEARNERS - 1), list[float]()
    for number in (below, below + 1):
        for block in blocks(student):
            block.fixed = max(number, block.lowest)
        accuracies.append(digits.accuracy(student))
    for block in blocks(student):
        block.fixed = None
    weight = part * LEARNERS - below
    return (1 - weight) * accuracies[0] + weight * accuracies[1]


def phases(student: Any, seed: int, folder: Path) -> list[Any]:
    """The student after each of the three."""
    stages = []
    for stage in RECIPE["stages"]:
        steps, rate = STEPS[stage["name"]]
        stages.append({**stage, "arguments": {"max_steps": steps, "learning_rate": rate, "save_strategy": "no"}})
    around = Surroundings(
        models={"teacher": teacher()},
        data={"train": digits.rows()},
        arguments={"per_device_train_batch_size": BATCH, "use_cpu": True, "logging_steps": 1000},
        data_collator=digits.collate,
        progress=False,
        seed=seed,
    )
    last = run_stages({"stages": stages}, student, folder, around)
    return [*(type(student).from_pretrained(folder / name) for name in ("0-learners", "1-gates")), last]


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student."""
    rate = STEPS["joint"][1]
    figures = {"accuracy of the teacher": digits.accuracy(teacher())}
    if variant == HALVED:
        small = vit(64, seed)
        kept = {name: weight for name, weight in teacher().state_dict().items() if ".mlp." not in name}
        small.load_state_dict(kept, strict=False)
        digits.train(small, steps=sum(steps for steps, _ in STEPS.values()), seed=seed, learning_rate=rate)
        return {"accuracy": digits.accuracy(small)} | figures
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = acm(teacher(), config={"learners": LEARNERS, "projections": variant != "feed-forward alone"})
    with tempfile.TemporaryDirectory() as folder:
        learned, gated, last = phases(student, seed, Path(folder))
    errors, part = held_out_errors(learned), share(gated)
    return {
        "accuracy": digits.accuracy(last),
        **figures,
        "share of the cost": share(last),
        **{f"error of {number} learners": error for number, error in enumerate(errors, 1)},
        "share after phase 2": part,
        "accuracy after phase 2": digits.accuracy(gated),
        "uniform after phase 2": uniform(gated, part),
    }


CLAIM = Claim(
    published="Better than early exits, token halting and MoEfication at equal cost, clearest below 12.5 GFLOPs, with "
    "a ViT-B on ImageNet.",
    check=f"Digits as sixteen tokens. Teacher: a ViT of 4 layers of width 32, feed-forward 128, {TEACHER_STEPS} steps "
    f"of {BATCH} images. {LEARNERS} learners a module; the three phases take "
    f"{', '.join(str(steps) for steps, _ in STEPS.values())} steps; β = {BUDGET}. Against it: the teacher with new "
    "feed-forward blocks half as wide, trained as long in all. Errors: held-out squared error of a module over its "
    "output's mean square. Uniform: every token of every module takes as many learners as the gates on average.",
    expected="The error falls with each learner; after phase 2 the gates at least as accurate as the uniform choice; "
    "after phase 3 the share of the cost within 0.03 of β, and more accurate than the half as wide.",
    variants=("projections and feed-forward", "feed-forward alone", HALVED),
    run=run,
)
