"""Questions about documents, answered by a text teacher, for a small encoder-decoder that learns from easy to hard.

Lamott, Shakir: Leveraging Distillation Techniques for Document Understanding: A Case Study with FLAN-T5, AI@WORK at
GI-Jahrestagung 2024, arXiv:2409.11282.

    1. a page's words become text whose spaces and line breaks keep their places
    2. a text teacher answers each question from that text; empty answers, refusals and explanations are dropped
    3. the student learns the teacher's words: L = - Σ_t log p_S(y_t | y_<t, prompt), mean over target tokens; gold
       answers are for evaluation alone
    4. rows come from the easiest part of the data, which grows with the step t until T_c, as in Platanios et al.
       (arXiv:1903.09848):  c(t) = min( 1, √( t / T_c · (1 - c0²) + c0² ) );  each batch is drawn evenly from that part

    ANLS = max over gold answers of 1 - NL where NL < 0.5, else 0;  NL = edits / length of the longer text
    difficulty: input tokens, target tokens, 1 - ANLS of the teacher's answer where there is gold, or the loss of the
    student as it is, taken again every `refresh` steps

    add_layout_marks(tokenizer, model)           # T5's tokenizer drops line breaks and runs of spaces
    rows = document_curriculum(documents, teacher=TextTeacher(server, cache="asked"), tokenizer=tokenizer)
    train = Curriculum(rows, batch=32, steps=1000, config=CurriculumConfig(T_c=500), difficulty="input_tokens")
    args = Seq2SeqTrainingArguments(max_steps=1000, per_device_train_batch_size=32,
                                    train_sampling_strategy="sequential", …)
    Seq2SeqTrainer(model, args, DataCollatorForSeq2Seq(tokenizer, model), train_dataset=train,
                   callbacks=[train.callback()]).train()
    tokenizer(student_text(words, boxes, question, tokenizer=tokenizer), return_tensors="pt")   # in use

`Curriculum` is a data set of the whole run and not a sampler, so that no Trainer need be subclassed: what row i is
depends on i and the seed, and with the student's loss on orders that are in the checkpoint's trainer state.

[reconstruction] No code was published and the paper's text was not at hand. That the page is given as spaced text and
that the student learns the teacher's answers alone is known second-hand; the rules of the layout, the prompts, what is
dropped, every difficulty and the pacing are ours. What the score against a teacher's answers says is loyalty, not
accuracy: evaluate on gold.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import datasets

from hf_compress.errors import ConfigurationError
from hf_compress.registry import Method
from hf_compress_plugins.encoders._competence import Curriculum as Curriculum
from hf_compress_plugins.encoders._competence import CurriculumConfig as CurriculumConfig
from hf_compress_plugins.encoders._document_layout import Box, check_layout, for_tokenizer, spatial_text
from hf_compress_plugins.encoders._document_layout import add_layout_marks as add_layout_marks
from hf_compress_plugins.encoders._document_layout import decode_layout as decode_layout

logger = logging.getLogger(__name__)

Layout = Literal["spatial", "reading"]
TEACHER_PROMPT = (
    "Below is the text of a document; spaces and line breaks show where its words stand.\n\n{document}\n\n"
    "Question: {question}\nAnswer with the words of the document that answer the question, in one line and nothing "
    "else. If it does not say, answer: none"
)
STUDENT_PROMPT = "{question}\n{document}"
"""The document last: what is too long for the model is cut from its end."""
NOTHING = frozenset({"", "none", "n/a", "null", "unknown", "not given", "not found", "not available", "no answer"})
REFUSAL = re.compile(
    r"(i'm sorry|i am sorry|sorry\b|i can't|i cannot|i am unable|i'm unable|as an ai|unfortunately|"
    r"the (document|text) (does not|doesn't)|there is no\b)",
    re.IGNORECASE,
)


def edits(one: str, other: str) -> int:
    """Levenshtein distance: characters put in, left out or replaced."""
    before = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, theirs in enumerate(other, 1):
            current.append(min(before[column] + 1, current[-1] + 1, before[column - 1] + (letter != theirs)))
        before = current
    return before[-1]


def anls(said: str, gold: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, 0 … 1, to the nearest of its gold answers.

    Case and white space at the ends are no difference; a similarity of 0.5 or less counts as 0.

    >>> anls("abcd", ["abce"]), anls("ab", ["cd"])
    (0.75, 0.0)
    """
    best = 0.0
    for answer in gold:
        given, true = said.strip().lower(), answer.strip().lower()
        distance = edits(given, true) / max(len(given), len(true), 1)
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def short_answer(text: str) -> str | None:
    """A teacher's answer without quotes, "Answer:" and runs of spaces; None where it gives none.

    None is what is empty, says that there is nothing, refuses, or explains: has more than one line.

    >>> short_answer('Answer: "12  May"'), short_answer("I'm sorry, I see no date."), short_answer("none.")
    ('12 May', None, None)
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        return None
    said = " ".join(re.sub(r"^\s*answer\s*:", "", lines[0], flags=re.IGNORECASE).split())
    if len(said) > 1 and said[0] == said[-1] and said[0] in "\"'`":
        said = said[1:-1].strip()
    return None if said.lower().rstrip(".") in NOTHING or REFUSAL.match(said) else said


def document_text(words: Sequence[str], boxes: Sequence[Box] | None, layout: Layout) -> str:
    """A page as text: with the places of its words, or these in their order with a space between."""
    if layout == "reading":
        return " ".join(part for word in words for part in word.split())
    if boxes is None:
        raise ConfigurationError("document_curriculum: layout='spatial' needs boxes. Pass them, or layout='reading'.")
    return spatial_text(words, boxes)


def student_text(
    words: Sequence[str],
    boxes: Sequence[Box] | None,
    question: str,
    *,
    tokenizer: Any,
    layout: Layout = "spatial",
    prompt: str = STUDENT_PROMPT,
) -> str:
    """What the student's tokenizer is given, in training as in use."""
    return for_tokenizer(prompt.format(question=question, document=document_text(words, boxes, layout)), tokenizer)


def document_curriculum(
    dataset: Iterable[Mapping[str, Any]],
    *,
    teacher: Callable[[Sequence[str]], list[str]],
    tokenizer: Any,
    layout: Layout = "spatial",
    parse: Callable[[str], str | None] = short_answer,
    teacher_prompt: str = TEACHER_PROMPT,
    student_prompt: str = STUDENT_PROMPT,
    max_length: int = 512,
    max_target_length: int = 64,
) -> datasets.Dataset:
    """Documents with questions as rows for an encoder-decoder, labelled by the teacher.

    Args:
        dataset: rows with "words" (texts), "boxes" (x0, y0, x1, y1 of each; not needed for the reading order),
            "question", and where there is gold "answers" (texts), which no target is made of.
        teacher: a `TextTeacher`, or a function from prompts to answers.
        tokenizer: the student's; one that drops spaces or line breaks needs `add_layout_marks`.
        layout: how both models read a page: "spatial" text, or its words in "reading" order.
        parse: what the student learns of a teacher's answer; None drops the row.
        teacher_prompt: with {document} and {question}.
        student_prompt: the same; ends with {document}.
        max_length: tokens that the student reads at most; the end of a longer document is cut off.
        max_target_length: tokens of an answer at most; a row with a longer one is dropped, as it explains.

    Returns:
        input_ids, attention_mask and labels; "answer"; the difficulties "input_tokens", "target_tokens" and
        "disagreement" (None without gold); "cut", whether the document was; "row", its place in the data.

    Raises:
        ConfigurationError: if the tokenizer destroys the layout, a prompt lacks a part, a box is none, or no answer
            is left.
        TeacherError: from the teacher; what it has answered is in its cache.
    """
    _check_prompts(teacher_prompt, student_prompt)
    if layout == "spatial":
        check_layout(tokenizer)
    given = list(dataset)
    texts = [document_text(row["words"], row.get("boxes"), layout) for row in given]
    answers = teacher(
        [teacher_prompt.format(question=row["question"], document=text) for row, text in zip(given, texts, strict=True)]
    )
    rows: list[dict[str, Any]] = []
    lost: Counter[str] = Counter()
    for place, (row, text, answer) in enumerate(zip(given, texts, answers, strict=True)):
        said = parse(answer)
        if not said or not said.strip():
            lost["no answer in it"] += 1
            continue
        labels = tokenizer(text_target=for_tokenizer(said, tokenizer))["input_ids"]
        if len(labels) > max_target_length:
            lost[f"more than {max_target_length} tokens"] += 1
            continue
        prompt = for_tokenizer(student_prompt.format(question=row["question"], document=text), tokenizer)
        gold = row.get("answers")
        rows.append(
            _encoded(prompt, tokenizer, max_length)
            | {"labels": labels, "target_tokens": len(labels), "answer": said, "row": place}
            | {"disagreement": 1 - anls(said, gold) if gold else None}
        )
    if not rows:
        raise ConfigurationError(f"document_curriculum: none of {len(given)} answers is left: {dict(lost)}.")
    logger.info("document_curriculum: %d of %d rows are left; dropped: %s", len(rows), len(given), dict(lost) or "none")
    if cut := sum(row["cut"] for row in rows):
        logger.warning(
            "document_curriculum: %d of %d documents have more than max_length=%d tokens; what stands at their end is "
            "hidden from the student. Raise it, or drop the rows whose 'cut' is True.", cut, len(rows), max_length,
        )  # fmt: skip
    return datasets.Dataset.from_list(rows)


def _check_prompts(teacher_prompt: str, student_prompt: str) -> None:
    for name, prompt in (("teacher_prompt", teacher_prompt), ("student_prompt", student_prompt)):
        if "{document}" not in prompt or "{question}" not in prompt:
            raise ConfigurationError(
                f"document_curriculum: {name} needs {{document}} and {{question}}, got {prompt!r}."
            )
    if not student_prompt.endswith("{document}"):
        raise ConfigurationError(
            f"document_curriculum: student_prompt must end with {{document}}, got {student_prompt!r}: of a long "
            "document what stands behind it would be cut off."
        )


def _encoded(prompt: str, tokenizer: Any, max_length: int) -> dict[str, Any]:
    encoded = tokenizer(prompt, truncation=True, max_length=max_length, verbose=False)
    whole = len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
    ids = list(encoded["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": list(encoded["attention_mask"]),
        "input_tokens": len(ids),
        "cut": whole > len(ids),
    }


METHOD = Method(
    title="Leveraging Distillation Techniques for Document Understanding: A Case Study with FLAN-T5",
    paper="arXiv:2409.11282",
    authors="Marcel Lamott, Muhammad Armaghan Shakir",
    year=2024,
    summary="A text teacher answers questions about pages written with their layout; the student learns its answers "
    "from easy to hard [reconstruction].",
    bibtex="""@misc{lamott2024leveraging,
  title = {Leveraging Distillation Techniques for Document Understanding: A Case Study with {FLAN-T5}},
  author = {Lamott, Marcel and Shakir, Muhammad Armaghan},
  year = {2024}, eprint = {2409.11282}, archivePrefix = {arXiv}
}""",
    algorithm=("supervised",),
    knowledge=("labelling", "curation"),
    tasks=("text2text-generation",),
    preparation=document_curriculum,
)
