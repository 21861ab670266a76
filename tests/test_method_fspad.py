"""FSPAD: a drafter made from its target, what it learns, and decoding with it whose output is unchanged."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.general.kd import kd
from hf_compress_plugins.language import _feature_drafting
from hf_compress_plugins.language import fspad as module
from hf_compress_plugins.language._feature_drafting import FeatureDrafter, assemble, best
from hf_compress_plugins.language._modeling_fspad import FSPADDrafter
from hf_compress_plugins.language.fspad import FSPAD, FSPADDecoding, feature_loss, fspad, noisy, scored, token_loss
from prepared import PREPARED
from scene import logits
from stub import GradientKeeper
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError

VOCAB = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": None,
    "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
CASE = replace(testing.Case("fspad", "text-generation"), **PREPARED["fspad"])


def target(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**SIZES | settings)).eval()


def drafter(teacher: Any, **config: Any) -> FSPADDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fspad(teacher, config=config).eval()


def sentences(count: int, draw: torch.Generator) -> Tensor:
    """(count, 24) of a small grammar: each word stands before one of two."""
    ids = torch.randint(3, VOCAB, (count, 1), generator=draw)
    for _ in range(23):
        turn = torch.randint(0, 2, (count, 1), generator=draw)
        ids = torch.cat([ids, 3 + (ids[:, -1:] * 5 + turn) % (VOCAB - 3)], 1)
    return ids


def teach(student: Any, teacher: Any, folder: Path, steps: int) -> None:
    rows = [
        {"input_ids": row, "labels": row} for row in sentences(steps * 8, torch.Generator().manual_seed(1)).tolist()
    ]
    arguments: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": steps,
    }  # fmt: skip
    Trainer(
        model=student,
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        callbacks=[DistillCallback(teacher, "fspad")],
    ).train()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FSPADDrafter]:
    """A target that has learned the grammar, and a drafter that has learned from it."""
    model, draw = target(initializer_range=0.1).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = sentences(16, draw)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made = drafter(model.eval()).train()
    teach(made, model, tmp_path_factory.mktemp("run"), 50)
    return model, made.eval()


# ---------------------------------------------------------------------- what is learned


def test_both_losses_by_hand() -> None:
    """Distances 1/2 and 2: (1/8 + 3/2) / 2. Target (3/4, 1/4), draft (1/2, 1/2): ln 2."""
    assert feature_loss(torch.tensor([[0.5, 2.0]]), torch.zeros(1, 2)).tolist() == [pytest.approx(0.8125)]
    value = token_loss(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]))
    assert value.tolist() == [pytest.approx(math.log(2))]
    own, theirs = logits(4, 5, 0), logits(4, 5, 1)
    entropy = token_loss(theirs, theirs)
    torch.testing.assert_close(token_loss(own, theirs) - entropy, kd(own, theirs, temperature=1.0))


def test_a_position_is_scored_by_the_label_of_its_feature_s_token() -> None:
    """Item i reads feature i and token i + 1; token 0 is nobody's target, and behind the last one nothing is read."""
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    labels = torch.tensor([[7, 7, -100, 7, 7, -100], [-100, 7, 7, -100, 7, 7]])
    assert scored(labels, real).int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]


def test_noise_has_the_width_of_its_row_and_does_not_know_of_padding() -> None:
    features = torch.ones(2, 8, 64)
    real = torch.arange(8) < torch.tensor([[8], [4]])
    draws = [
        noisy(features[:, :time], real[:, :time], scale=0.2, generator=torch.Generator().manual_seed(0)) - 1
        for time in (8, 8)
    ]
    wider = noisy(
        F.pad(features, (0, 0, 2, 3)), F.pad(real, (2, 3)), scale=0.2, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(draws[0], draws[1])
    torch.testing.assert_close(wider[:, 2:10][real] - 1, draws[0][real])
    assert not draws[0][1, 4:].any()
    for row, length in enumerate((8, 4)):
        width = 0.2 * 256 / length
        assert 0.9 * width < draws[0][row, :length].max() < width
        assert -width < draws[0][row, :length].min() < -0.9 * width


def test_a_step_compares_what_is_drafted_with_the_feature_one_token_on(tmp_path: Path) -> None:
    trainer, teacher = testing.trainer(CASE, tmp_path, objective=FSPAD(noise=0.0))
    made, batch = CASE.student(teacher), testing.collate(testing.rows("text-generation"))
    made.load_state_dict(trainer.model.state_dict(), strict=False)
    trainer.train()
    found: dict[str, list[Tensor]] = {"features": [], "tokens": []}
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True):
        with torch.no_grad():
            states = teacher.eval()(ids[None, :real], output_hidden_states=True).hidden_states[-1]
            drafted = made(ids[None, 1:real], states[:, :-1])
            head = teacher.lm_head
            for place in range(1, real - 1):
                regress, predict, wanted = (t[0, place] for t in (drafted.regress, drafted.predict, states[:, 1:]))
                found["features"].append(F.smooth_l1_loss(regress, wanted))
                found["tokens"].append(0.1 * F.cross_entropy(head(predict), head(wanted).softmax(-1)))
    (log,) = [entry for entry in trainer.state.log_history if "distill_loss" in entry]
    for name, values in found.items():
        assert log[f"distill/fspad.{name}"] == pytest.approx(float(torch.stack(values).mean()), rel=1e-4), name


def test_soft_labels_are_a_stated_part_of_the_step(tmp_path: Path) -> None:
    """The features' term moves the step by 0.951 of its length under soft labels of weight 0.1 alone."""
    steps = []
    for settings in ({}, {"feature_weight": 0.0}):
        keeper = GradientKeeper()
        made, _ = testing.trainer(
            CASE, tmp_path, objective=FSPAD(noise=0.0, **settings), dtype=torch.float64, callbacks=(keeper,)
        )
        made.train()
        steps.append(torch.cat([g.flatten() for _, g in sorted(keeper.gradients[0].items())]))
    assert float((steps[0] - steps[1]).norm() / steps[1].norm()) == pytest.approx(0.9512, abs=1e-3)


def test_prompts_are_not_learned_from_and_rows_without_labels_are(tmp_path: Path) -> None:
    rows = testing.rows("text-generation")
    logged = []
    for labels in ([-100] * 2, []):
        data = [
            row | {"labels": (labels + row["labels"])[: len(row["labels"])] if labels else row["labels"]}
            for row in rows
        ]
        made, _ = testing.trainer(CASE, tmp_path, objective=FSPAD(noise=0.0), data=data)
        made.train()
        logged.append(made.state.log_history[0]["distill_loss"])
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    made, _ = testing.trainer(CASE, tmp_path, objective=FSPAD(noise=0.0), data=bare)
    made.train()
    assert logged[0] != logged[1] == made.state.log_history[0]["distill_loss"]
    single, _ = testing.trainer(CASE, tmp_path, data=[{"input_ids": [5], "labels": [5]}] * 4)
    single.train()
    assert single.state.log_history[0]["distill_loss"] == 0


def test_a_student_that_is_no_drafter_and_features_of_another_model_are_refused(tmp_path: Path) -> None:
    plain, _ = testing.trainer(replace(CASE, student=None), tmp_path)
    with pytest.raises(MismatchError, match=r"must come from fspad\(target"):
        plain.train()
    narrow, _ = testing.trainer(CASE, tmp_path, wrap=lambda _: testing.models("text-generation")[0])
    with pytest.raises(MismatchError, match="drafter of width 96"):
        narrow.train()


# ---------------------------------------------------------------------- the drafter


def test_a_drafter_has_its_target_s_sizes_and_frozen_copies_of_embedding_and_head(tmp_path: Path) -> None:
    model = target()
    made = drafter(model)
    assert (made.config.num_key_value_heads, made.config.intermediate_size, len(made.layers)) == (2, 48, 1)
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight"}
    torch.testing.assert_close(made.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(made.embed_tokens.weight, model.model.embed_tokens.weight)
    assert made.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    made.save_pretrained(tmp_path / "drafter")
    loaded = AutoModel.from_pretrained(tmp_path / "drafter")
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen
    assert testing.weights_hash(loaded) == testing.weights_hash(made)
    assert loaded.config.auto_map["AutoModel"] == "_modeling_fspad.FSPADDrafter"
    named = get_class_from_dynamic_module(loaded.config.auto_map["AutoModel"], str(tmp_path / "drafter"))
    assert named is not FSPADDrafter
    alone = named.from_pretrained(tmp_path / "drafter")
    given = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, 32)
    torch.testing.assert_close(alone(*given).regress, made(*given).regress)
    code = ast.parse((tmp_path / "drafter" / "_modeling_fspad.py").read_text(encoding="utf-8"))
    sources = {node.module.partition(".")[0] for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    assert sources == {"__future__", "dataclasses", "typing", "torch", "transformers"}


def test_without_both_parts_it_is_eagle_s() -> None:
    """One linear layer before the block and one output behind it; switched off weights give the same."""
    model = target()
    ids, features = torch.tensor([[3, 4, 5, 6]]), torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    base = drafter(model, feature_sampling=False, partial_alignment=False)
    full = drafter(model)
    counts = [sum(p.numel() for p in one.parameters()) for one in (base, full)]
    assert counts[1] - counts[0] == 4 * 32 * 48 + 32  # three matrices and a norm, and the second half of W2_down
    state = full.state_dict() | base.state_dict()
    state["fc.mlp.down_proj.weight"] = torch.zeros(32, 48)
    state["layers.0.mlp.down_proj.weight"] = base.layers[0].mlp.down_proj.weight.repeat(2, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        own, theirs = full(ids, features), base(ids, features)
        joined = base.fc.fc(torch.cat([model.model.embed_tokens(ids), features], -1))
        torch.testing.assert_close(base.fc(model.model.embed_tokens(ids), features), joined)
    assert theirs.predict is theirs.regress
    torch.testing.assert_close(own.predict, theirs.predict)
    torch.testing.assert_close(own.regress, theirs.predict)


def test_tied_embeddings_stay_tied() -> None:
    made = drafter(target(tie_word_embeddings=True))
    assert made.lm_head.weight is made.embed_tokens.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2)), "no intermediate_size"),
        (lambda: target().model, "no output embedding"),
        (lambda: CohereForCausalLM(CohereConfig(**SIZES)), "logit_scale"),
    ],
)
def test_a_target_that_is_not_as_a_llama_is_refused(make: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        fspad(make())


def test_settings_that_a_drafter_does_not_have_are_refused() -> None:
    for name in ("feature_samplng", "hidden_size"):
        with pytest.raises(UnknownNameError, match=name):
            fspad(target(), config={name: 3})
    with pytest.raises(ConfigurationError, match="at least 0"):
        FSPAD(noise=-1.0)


# ---------------------------------------------------------------------- drafts


def test_of_equal_scores_the_first_stay_so_that_none_is_without_its_parent() -> None:
    scores, parents = torch.tensor([-1.0, -0.5, -1.0, -0.5, -2.0]), torch.tensor([-1, -1, 0, 1, 1])
    kept = best(scores, 3)
    assert kept.tolist() == [0, 1, 3]
    draft = assemble(9, torch.tensor([4, 5, 6, 7, 8]), parents, kept)
    assert (draft.ids.tolist(), draft.parents.tolist(), draft.depths.tolist()) == (
        [9, 4, 5, 7],
        [0, 0, 0, 2],
        [0, 1, 1, 2],
    )
    assert draft.sees.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert (draft.child(2, 7), draft.child(0, 7), draft.child(0, 4), draft.child(0, 9)) == (3, None, 1, None)


def paths(made: Any, features: Tensor, ids: Tensor, levels: int, top_k: int) -> dict[tuple[int, ...], float]:
    """Every path that a tree may hold with its log-probability, each drafted alone and from the start."""
    found: dict[tuple[int, ...], float] = {}
    level: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(levels):
        reached = []
        for path, score in level:
            states, tokens = features, ids
            for token in path:
                states = torch.cat([states, made(tokens[None], states[None]).regress[0, -1:]])
                tokens = torch.cat([tokens, torch.tensor([token])])
            top = made.lm_head(made(tokens[None], states[None]).predict[0, -1]).log_softmax(-1).topk(top_k)
            reached += [((*path, int(i)), score + float(v)) for v, i in zip(top.values, top.indices, strict=True)]
        found |= dict(reached)
        level = sorted(reached, key=lambda one: -one[1])[:top_k]
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tree_holds_the_likeliest_of_the_paths_that_the_drafter_gives_one_by_one(seed: int) -> None:
    """The text is read in two parts, as decoding does; levels see their ancestors alone."""
    made, draw = drafter(target(), initializer_range=0.15), torch.Generator().manual_seed(seed)
    features, ids = torch.randn(5, 32, generator=draw), torch.randint(3, VOCAB, (5,), generator=draw)
    with torch.no_grad():
        drafting = FeatureDrafter(made)
        drafting.read(features[:3], ids[:3])
        for _ in range(2):  # the second time behind another draft, of which nothing may be left
            draft = drafting.draft(int(ids[2]), levels=3, top_k=3, nodes=9, device=ids.device)
        drafting.read(features[3:], ids[3:])
        draft = drafting.draft(int(ids[-1]), levels=4, top_k=3, nodes=17, device=ids.device)
        every = paths(made, features, ids, 4, 3)
    lines = [tuple(draft.ids[draft.sees[node]].tolist())[1:] for node in range(1, 17)]
    assert set(lines) == {path for path, _ in sorted(every.items(), key=lambda one: -one[1])[:16]}
    assert len(every) == 30
    assert max(map(len, lines)) > 2


# ---------------------------------------------------------------------- decoding


def prompt(seed: int, length: int = 7) -> Tensor:
    return sentences(1, torch.Generator().manual_seed(seed))[:, :length]


def generate(model: Any, ids: Tensor, decoding: Any = None, seed: int = 0, **settings: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        settings = {"do_sample": False, "max_new_tokens": 30, "custom_generate": decoding} | settings
        return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [{}, {"top_k": 1, "depth": 4}], ids=["tree", "chain"])
def test_the_output_of_a_trained_pair_is_greedy_s_in_fewer_forwards(
    pair: tuple[Any, Any], attention: str, shape: dict[str, int]
) -> None:
    model, made = pair
    model.set_attn_implementation(attention)
    made.set_attn_implementation(attention)
    decoding = FSPADDecoding(made, **shape)
    forwards = 0
    for seed in range(4):
        ids = prompt(seed, 1 + 5 * seed)
        assert torch.equal(generate(model, ids, decoding), generate(model, ids))
        assert decoding.accepted == 30 == sum(decoding.each)
        assert decoding.forwards == len(decoding.each)
        assert max(decoding.each) <= (5 if shape else 6) + 1
        forwards += decoding.forwards
    assert forwards < 4 * 30 / 1.8


@pytest.mark.parametrize("kind", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_the_output_does_not_depend_on_the_drafter(kind: Any) -> None:
    model = target(*kind)
    plain = generate(model, prompt(1), max_new_tokens=20)
    for config in ({}, {"feature_sampling": False}, {"partial_alignment": False, "intermediate_size": 8}):
        decoding = FSPADDecoding(drafter(model, **config), nodes=20)
        assert torch.equal(generate(model, prompt(1), decoding, max_new_tokens=20), plain)


def test_from_one_seed_sampling_draws_the_tokens_of_plain_sampling(pair: tuple[Any, Any]) -> None:
    """Every token is one draw from the target's own scores on its own text: the distribution is the target's."""
    model, made = pair
    decoding, outputs, given = FSPADDecoding(made), set(), 0
    for seed in range(4):
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.95}
        found = generate(model, prompt(2), decoding, seed=seed, **settings)
        assert torch.equal(found, generate(model, prompt(2), seed=seed, **settings))
        outputs.add(tuple(found[0].tolist()))
        given += decoding.forwards
    assert len(outputs) == 4
    assert given < 4 * 30 / 1.3


def test_processors_see_the_text_of_each_token(pair: tuple[Any, Any]) -> None:
    model, made = pair
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "eos_token_id": 9}
    found = generate(model, prompt(3), FSPADDecoding(made), **settings)
    assert torch.equal(found, generate(model, prompt(3), **settings))
    assert not torch.equal(found, generate(model, prompt(3)))


class Ends(StoppingCriteria):
    """Ends behind a pair of tokens, wherever it stands in a draft."""

    def __init__(self, pair: list[int]) -> None:
        self.pair = pair

    def __call__(self, input_ids: Tensor, scores: Any, **settings: Any) -> Tensor:
        return torch.tensor([row[-2:].tolist() == self.pair for row in input_ids])


def test_it_ends_where_plain_decoding_does(pair: tuple[Any, Any]) -> None:
    model, made = pair
    decoding, ids = FSPADDecoding(made), prompt(4)
    plain = generate(model, ids)
    for limit in (1, 2, 3, 121):  # 128 positions
        settings: dict[str, Any] = {"max_new_tokens": limit}
        assert torch.equal(generate(model, ids, decoding, **settings), generate(model, ids, **settings))
        assert decoding.accepted == limit
    for place in (3, 12):
        settings = {"eos_token_id": int(plain[0, 7 + place])}
        assert torch.equal(generate(model, ids, decoding, **settings), generate(model, ids, **settings))
        settings = {"stopping_criteria": [Ends(plain[0, 6 + place : 8 + place].tolist())]}
        assert torch.equal(generate(model, ids, decoding, **settings), generate(model, ids, **settings))


def test_one_forward_of_the_target_a_draft(pair: tuple[Any, Any]) -> None:
    model, made = pair
    decoding, read = FSPADDecoding(made, nodes=11), list[int]()
    with model.register_forward_hook(lambda *called: read.append(called[-1].logits.shape[1])):
        generate(model, prompt(1), decoding)
    assert read[0] == 1
    assert len(read) == 1 + decoding.forwards
    assert max(read) == 11
    assert made.training is False
    assert not model.model._forward_hooks


def test_the_drafter_reads_the_target_s_features_of_what_was_accepted(pair: tuple[Any, Any]) -> None:
    model, made = pair
    read, original = list[tuple[Tensor, Tensor]](), FeatureDrafter.read

    def kept(self: FeatureDrafter, features: Tensor, ids: Tensor) -> None:
        read.append((features, ids))
        original(self, features, ids)

    decoding = FSPADDecoding(made)
    with mock.patch.object(FeatureDrafter, "read", kept):
        found = generate(model, prompt(1), decoding)
    assert max(decoding.each) > 2
    features, ids = (torch.cat(part) for part in zip(*read, strict=True))
    assert torch.equal(ids, found[0, 1 : 1 + len(ids)])
    assert len(ids) == found.shape[1] - 1 - decoding.each[-1]
    with torch.no_grad():
        states = model.model(found[:, : len(ids)]).last_hidden_state[0]
    torch.testing.assert_close(features, states, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (2, {}, "2 rows"),
        (1, {"num_beams": 2}, "beam_search"),
        (1, {"return_dict_in_generate": True}, "return_dict_in_generate"),
        (1, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "without padding"),
    ],
)
def test_what_is_not_decoding_of_one_row_is_refused(
    pair: tuple[Any, Any], rows: int, settings: dict[str, Any], message: str
) -> None:
    ids = prompt(0).expand(rows, -1)
    with pytest.raises(ConfigurationError, match=f"fspad: greedy decoding or sampling.*{message}"):
        pair[0].generate(ids, max_new_tokens=4, custom_generate=FSPADDecoding(pair[1]), **settings)


def test_a_drafter_of_another_model_or_with_other_attention_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(MismatchError, match="vocab_size is 24, the model's 30"):
        generate(target(vocab_size=30), prompt(0), FSPADDecoding(pair[1]))
    with pytest.raises(ConfigurationError, match="depth must be at least 0"):
        FSPADDecoding(pair[1], top_k=0)
    other = drafter(target())
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigurationError, match="set_attn_implementation"):
        FSPADDecoding(other)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (_feature_drafting, "best"),
        (_feature_drafting, "assemble"),
        (_feature_drafting, "additive"),
        (module, "check_call"),
    ],
)
def test_each_function_of_decoding_is_reached(pair: tuple[Any, Any], place: Any, name: str) -> None:
    with mock.patch.object(place, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        generate(pair[0], prompt(0), FSPADDecoding(pair[1]))
