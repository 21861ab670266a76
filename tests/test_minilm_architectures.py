"""Self-attention relations on real architectures: fused projections, shared keys and values, a teacher assistant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders.minilm import MiniLM, minilm_relation
from stub import GradientKeeper, arguments
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_compress import DistillCallback
from hf_compress.errors import MismatchError
from hf_compress.objective import sizes

WORDS, LENGTHS = 40, (9, 6, 4)
COMMON: dict[str, Any] = {"vocab_size": WORDS, "initializer_range": 0.4, "pad_token_id": 0}


def gpt2(width: int, layers: int) -> GPT2LMHeadModel:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**COMMON, **quiet, n_embd=width, n_layer=layers, n_head=4, n_positions=16))


def modernbert(width: int, layers: int) -> ModernBertForMaskedLM:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**COMMON, **sizes, **ids, initializer_cutoff_factor=4.0))


def llama(width: int, layers: int, shared: int = 2) -> LlamaForCausalLM:
    """`shared` keys and values for four queries."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(**COMMON, **sizes, num_key_value_heads=shared, bos_token_id=1, eos_token_id=2))


def made(build: Any, *sizes: int, seed: int) -> Any:
    """A model whose head is fixed, as nothing teaches it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(*sizes).double()
    body = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in body)
    return model


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (3, max(LENGTHS)), generator=draw)
    mask = torch.tensor([[int(place < length) for place in range(max(LENGTHS))] for length in LENGTHS])
    return {"input_ids": ids * mask, "attention_mask": mask}


def train(
    folder: Path, student: Any, teacher: Any, method: MiniLM, **settings: Any
) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """On the three rows, without labels."""
    whole, keeper = batch(), GradientKeeper()
    rows = [{"input_ids": whole["input_ids"][i].tolist(), "row": i} for i in range(3)]
    trainer = Trainer(
        model=student,
        args=arguments(folder, **({"learning_rate": 0.0} | settings)),
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda items: {name: value[[item["row"] for item in items]] for name, value in whole.items()},
        callbacks=[DistillCallback(teacher, method), keeper],
    )
    trainer.train()
    return trainer, keeper.gradients


def projected(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Tensor]:
    """What modules put out on the batch, by letters; of a fused one the letters stand one after another."""
    found: dict[str, Tensor] = {}
    handles = []
    for letters, name in names.items():

        def keep(_module: Any, _args: Any, output: Tensor, letters: str = letters) -> None:
            found.update(zip(letters, output.detach().chunk(len(letters), -1), strict=True))

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(**batch())
    for handle in handles:
        handle.remove()
    return found


def test_a_decoder_without_its_head_looks_back_alone_too(tmp_path: Path) -> None:
    """Body alone, beside a teacher of either kind: what is compared is what attention sees."""
    found = []
    for kind in ("head", "body", "teacher"):
        student, teacher = made(llama, 16, 2, seed=0), made(llama, 32, 3, seed=1)
        if kind == "body":
            student = student.model
        if kind == "teacher":
            teacher = teacher.model
        trainer, _ = train(tmp_path, student, teacher, MiniLM(relation_heads=2))
        found.append(trainer.state.log_history[0]["distill_loss"])
    assert found[1:] == pytest.approx([found[0]] * 2)


def test_which_models_look_back_alone() -> None:
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    back = made(llama, 16, 1, seed=0).model, made(gpt2, 16, 1, seed=0)
    both = BertModel(bert), made(modernbert, 16, 1, seed=0)
    assert [sizes(model).causal for model in (*back, *both)] == [True, True, False, False]


FUSED = [
    ("GPT-2", gpt2, ("qk", "vv"), "qkv", "transformer.h.{}.attn.c_attn", True),
    ("GPT-2", gpt2, ("qq", "kk", "vv"), "qkv", "transformer.h.{}.attn.c_attn", True),
    ("ModernBERT", modernbert, ("vv",), "qkv", "model.layers.{}.attn.Wqkv", False),
]


@pytest.mark.parametrize(("name", "build", "relations", "letters", "path", "causal"), FUSED)
@pytest.mark.parametrize("heads", [4, 2, 8])
def test_fused_projections(
    name: str,
    build: Any,
    relations: tuple[str, ...],
    letters: str,
    path: str,
    causal: bool,
    heads: int,
    tmp_path: Path,
) -> None:
    """The parts of one matrix, by the model's own order; queries and keys of ModernBERT are rotated after it."""
    student, teacher = made(build, 16, 2, seed=0), made(build, 32, 3, seed=1)
    own, theirs = (projected(model, {letters: path.format(layer)}) for model, layer in ((student, 1), (teacher, 2)))
    tokens = batch()["attention_mask"].bool()
    weights = (1.0,) * len(relations)
    trainer, gradients = train(
        tmp_path, student, teacher, MiniLM(relations=relations, weights=weights, relation_heads=heads)
    )
    for pair in relations:
        expected = minilm_relation(
            (own[pair[0]], own[pair[1]]), (theirs[pair[0]], theirs[pair[1]]), tokens, heads=heads, causal=causal
        )
        assert expected.min() > 1e-3
        logged = trainer.state.log_history[0]["distill_loss" if len(relations) == 1 else f"distill/minilm.{pair}"]
        assert logged == pytest.approx(expected.mean().item(), rel=1e-6)
    assert gradients[0][f"{path.format(1)}.weight"].abs().max() > 0


@pytest.mark.parametrize("shared", [(2, 2), (1, 2), (4, 1)])
def test_keys_and_values_that_queries_share(shared: tuple[int, int], tmp_path: Path) -> None:
    """Relations of values are taken as wide as they are: no copy for each query, which would only count them again."""
    student = made(llama, 16, 2, shared[0], seed=0)
    teacher = made(llama, 32, 3, shared[1], seed=1)
    own, theirs = (
        projected(model, {"v": f"model.layers.{layer}.self_attn.v_proj"})["v"]
        for model, layer in ((student, 1), (teacher, 2))
    )
    assert (own.shape[-1], theirs.shape[-1]) == (4 * shared[0], 8 * shared[1])
    trainer, gradients = train(tmp_path, student, teacher, MiniLM(relation_heads=4))
    tokens = batch()["attention_mask"].bool()
    expected = minilm_relation((own, own), (theirs, theirs), tokens, heads=4, causal=True)
    assert trainer.state.log_history[0]["distill/minilm.vv"] == pytest.approx(expected.mean().item(), rel=1e-6)
    for letter in "qkv":
        assert gradients[0][f"model.layers.1.self_attn.{letter}_proj.weight"].abs().max() > 0


def test_queries_and_shared_keys_have_no_relation(tmp_path: Path) -> None:
    student, teacher = made(llama, 16, 2, seed=0), made(llama, 32, 3, seed=1)
    v1 = MiniLM(relations=("qk", "vv"), weights=(1.0, 1.0), relation_heads=4)
    with pytest.raises(MismatchError, match=r"needs one width.*'qq', 'kk', 'vv'"):
        train(tmp_path, student, teacher, v1)
    with pytest.raises(MismatchError, match="relation_heads=16 does not divide the width 8"):
        train(tmp_path, made(llama, 16, 2, seed=0), teacher, MiniLM(relation_heads=16))


def bert(width: int, layers: int) -> BertModel:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    return BertModel(BertConfig(**COMMON, **sizes, **quiet), add_pooling_layer=False)


def test_a_teacher_assistant_is_a_run_before_the_students(tmp_path: Path) -> None:
    """First the width is given up, in all layers, then the depth; each run's loss falls, and the assistant of the
    second is left as the first made it."""
    set_seed(0)
    teacher, assistant, student = made(bert, 32, 4, seed=1), made(bert, 16, 4, seed=2), made(bert, 16, 2, seed=3)
    v1 = MiniLM(relations=("qk", "vv"), weights=(1.0, 1.0), relation_heads=4)
    settings: dict[str, Any] = {"max_steps": 25, "optim": "adamw_torch", "learning_rate": 1e-2}
    first, _ = train(tmp_path, assistant, teacher, v1, **settings)
    first.save_model(str(tmp_path / "assistant"))
    taught = BertModel.from_pretrained(tmp_path / "assistant", add_pooling_layer=False).double()
    second, gradients = train(tmp_path, student, taught, MiniLM(v1.config), **settings)
    for trainer in (first, second):
        losses = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
        assert losses[-1] < 0.6 * losses[0]
    kept = BertModel.from_pretrained(tmp_path / "assistant", add_pooling_layer=False).double()
    for name, tensor in taught.state_dict().items():
        torch.testing.assert_close(tensor, kept.state_dict()[name], rtol=0, atol=0)
    assert gradients[0]["encoder.layer.1.attention.self.value.weight"].abs().max() > 0
