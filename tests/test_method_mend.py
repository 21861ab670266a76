"""MEND: vectors in place of demonstrations, behind them a language model that stays as it is."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import output_of
from datasets import Dataset
from hf_compress_plugins.encoders._modeling_mend import MENDForCausalLM, positions_of
from hf_compress_plugins.encoders.mend import (
    FIRST_WORD,
    RECIPE,
    Episode,
    answer_scores,
    candidates,
    check_tokens,
    distillation,
    episode,
    episodes,
    mend,
    padded,
)
from prepared import PREPARED
from safetensors import safe_open
from scene import logits
from stub import GradientKeeper
from tiny import VOCAB, tiny_plain_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_compress import export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.objective import sizes
from hf_compress.onnx import load_onnx
from hf_compress.stages import Surroundings, run_stages

CASE = replace(testing.Case("mend", "text-generation"), **PREPARED["mend"])
TOKENIZER = tiny_plain_tokenizer()
COUNT = 3
SHOWN, QUERY = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]]), torch.tensor([[10, 11, 12], [13, 10, 11]])


def llama(width: int = 16, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCAB), "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "eos_token_id": None,
        "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | settings))).eval()


def gpt2(width: int = 16, seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """With absolute positions."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCAB), "n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 96,
        "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**(sizes | settings))).eval()


def made(teacher: Any = None, distiller: Any = None, **config: Any) -> MENDForCausalLM:
    given = {"distiller": llama(8, seed=1) if distiller is None else distiller, "num_virtual_tokens": COUNT} | config
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return mend(llama() if teacher is None else teacher, config=given)


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = PREPARED["mend"]["prepare"](None, None)["data_collator"](batch)
    return found


def tasks(count: int = 4) -> Dataset:
    """Two tasks, words in one and their first letters as answers."""
    words = ["film", "book", "actor", "music", "story", "good", "bad", "fine"][: 2 * count]
    rows = [{"task": "ab"[place % 2], "input": word, "output": word[0]} for place, word in enumerate(words)]
    return Dataset.from_list(rows)


def real(row: dict[str, Any], name: str, mask: str) -> list[int]:
    return [token for token, kept in zip(row[name], row[mask], strict=True) if kept]


# ---------------------------------------------------------------------- what is learned


def test_the_divergence_by_hand_has_no_factor_of_the_temperature() -> None:
    """Teacher (3/4, 1/4) at T = 2, student (1/2, 1/2)."""
    value = distillation(torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]]), temperature=2.0)
    assert value.tolist() == [pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))]
    own, theirs = logits(4, 5, 0).requires_grad_(), logits(4, 5, 1).requires_grad_()
    distillation(own, theirs, temperature=1.0).sum().backward()
    torch.testing.assert_close(own.grad, own.softmax(-1) - theirs.softmax(-1))
    assert theirs.grad is None


def test_an_answer_is_scored_by_the_mean_over_its_tokens() -> None:
    """(1/4 · 1/2) over two tokens, 1/4 over one; each is read one place before it stands."""
    given = torch.full((2, 4, 3), -50.0)
    given[:, 1] = torch.tensor([2.0, 1.0, 1.0]).log()
    given[:, 2] = torch.tensor([1.0, 2.0, 1.0]).log()
    labels = torch.tensor([[-100, -100, 1, 1], [-100, -100, -100, 2]])
    expected = [(math.log(0.25) + math.log(0.5)) / 2, math.log(0.25)]
    assert answer_scores(given, labels).tolist() == pytest.approx(expected)


def test_layouts_of_other_tokens_are_refused(tmp_path: Path) -> None:
    ids = torch.tensor([3, 4, 5])
    check_tokens(ids, ids)
    for other in (ids[1:], torch.tensor([3, 5, 4])):
        with pytest.raises(MismatchError, match="not the same"):
            check_tokens(ids, other)

    def cut(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The teacher's rows cut from the left, their mask of demonstrations from the right."""
        found = collate(batch)
        for name in ("teacher_input_ids", "teacher_attention_mask"):
            found[name] = found[name][:, 1:]
        return found | {"teacher_demonstrations": found["teacher_demonstrations"][:, :-1]}

    trainer, _ = testing.trainer(CASE, tmp_path, give=lambda _: {"data_collator": cut})
    with pytest.raises(MismatchError, match="not the same"):
        trainer.train()

    def bare(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = collate(batch)
        del found["demonstration_ids"]
        return found

    trainer, _ = testing.trainer(CASE, tmp_path, give=lambda _: {"data_collator": bare})
    with pytest.raises(MismatchError, match=r"has no demonstration_ids.*episodes"):
        trainer.train()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_by_hand(temperature: float, tmp_path: Path) -> None:
    """Row by row, without padding: mean over all tokens of query and answer, and over the labels of the answer."""
    objective = CASE.objective().__class__(temperature=temperature)
    trainer, teacher = testing.trainer(CASE, tmp_path, objective=objective)
    student = trainer.model.eval()
    divergences, entropies = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        virtual = student.demonstration_model.virtual_tokens[None]
        for row in testing.rows("text-generation"):
            ids, third = torch.tensor([row["input_ids"]]), len(row["input_ids"]) // 3
            reader = student.demonstration_model
            embeddings = torch.cat([reader.body.get_input_embeddings()(ids[:, :third]), virtual], 1)
            vectors = reader.adapter(reader.body(inputs_embeds=embeddings).last_hidden_state[:, -3:]).tanh()
            query = ids[:, third:]
            behind = torch.cat([vectors, teacher.get_input_embeddings()(query)], 1)
            own = teacher.eval()(inputs_embeds=behind).logits[0, 3:]
            theirs = teacher(input_ids=ids).logits[0, third:]
            p, q = ((one / temperature).log_softmax(-1) for one in (theirs, own))
            divergences += (p.exp() * (p - q)).sum(-1)
            entropies += F.cross_entropy(own[third - 1 : -1], query[0, third:], reduction="none")
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "distill_loss" in entry]
    assert log["distill_loss"] == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-4)
    assert log["task_loss"] == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-4)
    assert log["loss"] == pytest.approx(log["distill_loss"] + log["task_loss"], rel=1e-3)


def test_gradients_pass_the_frozen_model_to_all_that_is_trained(tmp_path: Path) -> None:
    keeper = GradientKeeper()
    trainer, _ = testing.trainer(CASE, tmp_path, callbacks=(keeper,))
    before = testing.weights_hash(trainer.model.language_model)
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters() if name.startswith("demonstration_model.")}
    assert keeper.gradients[0].keys() == names
    assert {"demonstration_model.virtual_tokens", "demonstration_model.adapter.weight"} < names
    assert all(gradient.abs().max() > 0 for gradient in keeper.gradients[0].values())
    assert testing.weights_hash(trainer.model.language_model) == before


# ---------------------------------------------------------------------- the model


def test_the_language_model_is_frozen_and_without_dropout_whatever_is_asked() -> None:
    model = made(gpt2(resid_pdrop=0.5, embd_pdrop=0.5), gpt2(16, seed=1, resid_pdrop=0.5))
    model.train().requires_grad_(True)
    assert not any(module.training for module in model.language_model.modules())
    assert model.demonstration_model.body.training
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert all(p.requires_grad for p in model.demonstration_model.parameters())
    vectors = model.eval().distill(SHOWN)
    model.train()
    torch.testing.assert_close(*(model(QUERY, virtual_tokens=vectors).logits for _ in range(2)))
    assert not torch.equal(*(model.distill(SHOWN) for _ in range(2)))


@pytest.mark.parametrize("kind", [llama, gpt2])
def test_padding_on_either_side_moves_nothing(kind: Any) -> None:
    model = made(kind(), kind(8, seed=1))
    expected = model(QUERY, demonstration_ids=SHOWN)
    for side in ((2, 0), (0, 2)):
        shown, query = F.pad(SHOWN, side, value=17), F.pad(QUERY, side, value=17)
        masks = [F.pad(torch.ones_like(ids), side) for ids in (SHOWN, QUERY)]
        found = model(query, masks[1], demonstration_ids=shown, demonstration_mask=masks[0])
        torch.testing.assert_close(found.logits[masks[1].bool()], expected.logits.flatten(0, 1))
    assert positions_of(torch.tensor([[0, 0, 1, 1, 0, 1]])).tolist() == [[0, 0, 0, 1, 1, 2]]


def test_what_stands_for_demonstrations() -> None:
    """Read in order, through tanh where widths differ; without demonstrations the whole is the language model."""
    model, same = made(), made(distiller=llama(16, seed=1))
    vectors = model.distill(SHOWN)
    assert vectors.shape == (2, COUNT, 16)
    assert vectors.abs().max() < 1
    assert same.demonstration_model.adapter is None
    assert same.distill(SHOWN).abs().max() > 1
    assert not torch.allclose(vectors, model.distill(SHOWN.flip(1)))
    torch.testing.assert_close(model(QUERY).logits, model.language_model(QUERY).logits)
    given = model(QUERY, demonstration_ids=SHOWN, labels=QUERY)
    torch.testing.assert_close(given.logits, model(QUERY, virtual_tokens=vectors).logits)
    expected = F.cross_entropy(given.logits[:, :-1].flatten(0, 1), QUERY[:, 1:].flatten())
    torch.testing.assert_close(given.loss, expected)
    assert given.logits.shape == (2, 3, len(VOCAB))


@pytest.mark.parametrize("kind", [llama, gpt2])
def test_it_writes_with_a_cache_what_it_writes_without(kind: Any) -> None:
    """Demonstrations once for both queries, one padded on the left."""
    model = made(kind(), kind(8, seed=1))
    vectors, query, mask = model.distill(SHOWN[:1]), QUERY.clone(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = model.generate(query, attention_mask=mask, virtual_tokens=vectors, max_new_tokens=5, do_sample=False)
    for row in range(2):
        ids = query[row, 1 - row :][None]
        for _ in range(5):
            ids = torch.cat([ids, model(ids, virtual_tokens=vectors).logits[:, -1:].argmax(-1)], 1)
        assert found[row, 1 - row :].tolist() == ids[0].tolist()
    plain = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    again = model.generate(input_ids=query, demonstration_ids=SHOWN[:1], return_dict_in_generate=True, **plain)
    assert torch.equal(again.sequences, found)
    without = model.generate(query, **plain)
    assert torch.equal(without, model.language_model.generate(query, **plain))
    assert not torch.equal(without, found)
    beams = model.generate(query, virtual_tokens=vectors, num_beams=2, num_return_sequences=2, **plain)
    assert beams[:, :3].tolist() == query.repeat_interleave(2, 0).tolist()


def test_a_saved_one_loads_from_its_folder_alone_and_holds_the_language_model_once(tmp_path: Path) -> None:
    teacher = llama(tie_word_embeddings=True)
    teacher.generation_config.max_new_tokens = 7
    model = made(teacher)
    model.save_pretrained(tmp_path / "student")
    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "language_model.lm_head.weight" not in names
    assert len(names) == len({p.data_ptr() for p in model.parameters()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert testing.weights_hash(loaded) == testing.weights_hash(model)
    assert not any(p.requires_grad for p in loaded.language_model.parameters())
    assert all(p.requires_grad for p in loaded.demonstration_model.parameters())
    assert loaded.generation_config.max_new_tokens == 7
    call = "model(torch.tensor([[10, 11, 12]]), demonstration_ids=torch.tensor([[5, 6, 7, 8]])).logits"
    alone = output_of(tmp_path / "student", "AutoModelForCausalLM", call)
    torch.testing.assert_close(alone, model(QUERY[:1], demonstration_ids=SHOWN[:1]).logits)
    code = ast.parse((tmp_path / "student" / "_modeling_mend.py").read_text(encoding="utf-8"))
    sources = {node.module.partition(".")[0] for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    assert sources == {"__future__", "typing", "torch", "transformers"}


def test_what_is_exported_is_the_network_that_reads_demonstrations(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "student")
    assert export_onnx(tmp_path / "student").value("parity_max_abs_diff") < 1e-5
    graph = load_onnx(tmp_path / "student" / "onnx", graph="demonstrations")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = graph(input_ids=SHOWN, attention_mask=mask)["last_hidden_state"]
    torch.testing.assert_close(found, model.distill(SHOWN, mask), rtol=1e-4, atol=1e-5)


def test_a_student_is_made_of_copies() -> None:
    teacher, reader = llama(), llama(8, seed=1)
    model = made(teacher, reader, start="vocabulary")
    for own, theirs in ((model.language_model, teacher), (model.demonstration_model.body, reader.model)):
        assert testing.weights_hash(own) == testing.weights_hash(theirs)
        assert {p.data_ptr() for p in own.parameters()}.isdisjoint(p.data_ptr() for p in theirs.parameters())
    table = reader.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in model.demonstration_model.virtual_tokens)
    known = mend(llama(vocab_size=FIRST_WORD + 3), config={"start": "vocabulary", "num_virtual_tokens": 60})
    table = known.get_input_embeddings().weight
    found = {(row == table).all(1).nonzero().item() for row in known.demonstration_model.virtual_tokens}
    assert found == {FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2}  # special and rare tokens are not drawn
    spread = made(distiller=llama(64, seed=1), num_virtual_tokens=50).demonstration_model.virtual_tokens.std()
    assert float(spread) == pytest.approx(0.3, rel=0.05)
    itself = mend(teacher)
    assert itself.demonstration_model.virtual_tokens.shape == (100, 16)
    assert testing.weights_hash(itself.demonstration_model.body) == testing.weights_hash(teacher.model)
    assert mend(teacher.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="num_virtual_tokens"):
        mend(llama(), config={"num_virtual_token": 3})
    for wrong in ({"num_virtual_tokens": 0}, {"start": "zeros"}):
        with pytest.raises(ConfigurationError, match="num_virtual_tokens must be"):
            mend(llama(), config=wrong)
    with pytest.raises(MismatchError, match=r"distiller knows 40 tokens"):
        made(distiller=llama(8, vocab_size=40))
    small = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": len(VOCAB)}
    with pytest.raises(MismatchError, match="causal language models, got a T5"):
        mend(T5ForConditionalGeneration(T5Config(**small)))
    with pytest.raises(MismatchError, match=r"must come from mend\(llm\)"):
        CASE.objective().needs(sizes(llama()), sizes(llama()))
    with pytest.raises(ConfigurationError, match="temperature"):
        CASE.objective().__class__(temperature=0.0)


# ---------------------------------------------------------------------- data


def test_demonstrations_are_others_of_the_task_and_both_layouts_are_one_example() -> None:
    data = tasks()
    found = episodes(data, tokenizer=TOKENIZER, demonstrations=2, max_length=80, demonstration_length=60)
    for row, given in zip(found, data, strict=True):
        shown = real(row, "demonstration_ids", "demonstration_mask")
        own, theirs = real(row, "input_ids", "attention_mask"), real(row, "teacher_input_ids", "teacher_attention_mask")
        assert theirs == shown + own
        assert sum(row["teacher_demonstrations"]) == len(shown)
        assert row["teacher_demonstrations"][: len(shown)] == [1] * len(shown)
        answer = [label for label in row["labels"] if label != -100]
        assert TOKENIZER.decode(answer).replace(" ", "") == given["output"]
        assert own[-len(answer) :] == answer
        words = [other["input"] for other in data if other["task"] == given["task"] and other != given]
        text = TOKENIZER.decode(shown)
        assert sum(word in text for word in words) == 2
        assert given["input"] not in text
    again = [
        episodes(data, tokenizer=TOKENIZER, demonstrations=2, seed=seed)["demonstration_ids"] for seed in (0, 0, 1)
    ]
    assert again[0] == again[1] != again[2]


def test_what_does_not_fit_in_is_left_out_as_a_whole() -> None:
    pairs = [("a film", "good"), ("a book", "bad"), ("an actor", "fine")]
    length = len(episode(pairs[:2], "story", "dull", tokenizer=TOKENIZER).demonstrations)
    for limits in ((100, length), (length + 2, 90), (length + 2 + 1, 90)):
        assert len(episode(pairs, "story", "dull", tokenizer=TOKENIZER, limits=limits).demonstrations) == length
    with pytest.raises(MismatchError, match="leave no room"):
        episode(pairs, "story", "dull", tokenizer=TOKENIZER, limits=(2, 1))
    long = (" ".join(["film"] * 40), "good")
    assert episode([long, *pairs], "story", "dull", tokenizer=TOKENIZER, limits=(100, length)).demonstrations == (
        episode(pairs[:2], "story", "dull", tokenizer=TOKENIZER).demonstrations
    )
    with pytest.raises(MismatchError, match="none of 1 demonstrations fits into 30 tokens"):
        episode([long], "story", "dull", tokenizer=TOKENIZER, limits=(100, 30))
    single = Dataset.from_list([{"task": "a", "input": "film", "output": "good"}])
    with pytest.raises(MismatchError, match="'a' has one row"):
        episodes(single, tokenizer=TOKENIZER)
    with pytest.raises(MismatchError, match="column text, or task"):
        episodes(single.remove_columns("task"), tokenizer=TOKENIZER)
    with pytest.raises(ConfigurationError, match="demonstration_length < max_length"):
        episodes(tasks(), tokenizer=TOKENIZER, max_length=10, demonstration_length=10)


def test_four_fifths_of_a_text_stand_for_demonstrations() -> None:
    words = "a film was very good and the story is not bad but slow"
    (row,) = episodes(Dataset.from_dict({"text": [words]}), tokenizer=TOKENIZER, max_length=10, demonstration_length=7)
    ids = TOKENIZER(words, add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == ids[8:10]
    assert row["demonstration_ids"] == ids[1:8]
    assert row["teacher_input_ids"] == ids[1:10]
    assert "labels" not in row


def test_candidates_are_rows_of_one_query() -> None:
    found = candidates([("film", "good")], "book", ["bad", "very dull"], tokenizer=TOKENIZER)
    assert (found["labels"] != -100).sum(1).tolist() == [1, 2]
    assert torch.equal(found["demonstration_ids"][0], found["demonstration_ids"][1])
    assert answer_scores(made()(**found).logits, found["labels"]).shape == (2,)
    pairs, short, long = [("a film", "good"), ("a book", "bad"), ("a story", "dull")], "a", "very very"
    every = episode(pairs, "book", short, tokenizer=TOKENIZER)
    limits = (sum(map(len, (every.demonstrations, every.query, every.answer))), 90)
    found_ = candidates(pairs, "book", [short, long], tokenizer=TOKENIZER, limits=limits)
    assert torch.equal(found_["demonstration_ids"][0], found_["demonstration_ids"][1])
    alone = candidates(pairs, "book", [short], tokenizer=TOKENIZER, limits=limits)
    assert alone["demonstration_ids"].shape[1] > found_["demonstration_ids"].shape[1]  # what its length leaves room for
    empty = padded([Episode(demonstrations=(), query=(3, 4), answer=())], pad=0)
    assert empty["demonstration_mask"].tolist() == [[0]]
    logits = made()(**{name: value for name, value in empty.items() if not name.startswith("teacher")}).logits
    assert logits.isfinite().all()


def test_both_stages_through_the_recipe(tmp_path: Path) -> None:
    llm, texts = llama(), Dataset.from_dict({"text": ["a film was very good and slow", "the story is not bad"] * 2})
    around = Surroundings(
        models={"llm": llm},
        data={"text": texts, "tasks": tasks()},
        arguments={"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1},
        processing_class=TOKENIZER,
        preparing={"demonstrations": 2, "max_length": 60, "demonstration_length": 50},
        progress=False,
    )
    start = made(llm)
    done = run_stages(RECIPE, start, tmp_path, around)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "0-pretraining")
    states = [testing.weights_hash(one.demonstration_model) for one in (start, first, done)]
    assert len(set(states)) == 3
    assert {testing.weights_hash(one.language_model) for one in (start, first, done)} == {testing.weights_hash(llm)}
    steps = [done.config.compression["before"][0], done.config.compression]
    assert [step["methods"][0]["name"] for step in steps] == ["mend", "mend"]
    assert not any(p.requires_grad for p in done.language_model.parameters())
