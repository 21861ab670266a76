"""Every parser of ours takes any bytes in bounded time: the right result, or an error of ours that names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import TARGETS, run, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_compress import files
from hf_compress.recipe import Recipe, read_recipe

SLOW = {"read_csv": 15, "read_jsonl": 15}
"""Examples of parsers that take some hundredths of a second."""
EXAMPLES = 80
TOKENS = [
    *(b"%c" % each for each in b"\"'{}[]:,\n\0\xff"),
    *(b"---\n", b"- ", b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xae", b"\x1b]0;", b"[" * 80, b"{" * 80),
    *(b"null", b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"0.5", b"true", b"&a ", b"*a", b"<<: "),
    *(b"!!python/object:os.system ", b"../", b"/etc/passwd", b"__class__"),
]


@st.composite
def spoilt(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A valid file with some of it cut out, doubled, or written over."""
    raw = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = draw(st.integers(start, min(len(raw), start + 30)))
        put = draw(st.sampled_from([b"", raw[start:stop] * 2, *TOKENS]) | st.binary(max_size=4))
        raw = raw[:start] + put + raw[stop:]
    return raw


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_takes_any_bytes(name: str) -> None:
    @settings(max_examples=SLOW.get(name, EXAMPLES), deadline=3000, derandomize=True, database=None)
    @given(raw=spoilt(TARGETS[name][2]) | st.binary(max_size=40))
    def parse(raw: bytes) -> None:
        message = run(name, raw)
        assert message is None or (0 < len(message) < 100_000)

    parse()


@pytest.mark.parametrize("name", TARGETS)
def test_the_files_to_begin_with_are_good(name: str) -> None:
    said = [run(name, seed) for seed in TARGETS[name][2]]
    assert not any(said), said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(), VALUES, max_size=5))
def test_what_is_no_fault_comes_back_as_it_was(value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps(value))
    assert files.read_json(path) == value


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), st.integers(0, 9)
    ),
    twice=st.booleans(),
)
def test_a_header_is_read_as_it_is_and_a_name_twice_is_refused(
    names: dict[str, int], twice: bool, tmp_path: Path
) -> None:
    entries = [f"{json.dumps(name)}: {json.dumps({'n': number})}" for name, number in names.items()]
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors("{" + ", ".join([*entries, *entries[: int(twice)]]) + "}"))
    if twice and names:
        with pytest.raises(files.ForeignFileError, match="twice"):
            files.check_safetensors(path)
    else:
        assert files.check_safetensors(path) == {name: {"n": number} for name, number in names.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(1, 100) | st.lists(st.integers(0, 100), min_size=1, max_size=4),
    epochs=st.floats(0.1, 1e6),
    labels=st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_recipe_comes_back_as_it_was(
    layers: int | list[int], epochs: float, labels: list[str] | None, seed: int, tmp_path: Path
) -> None:
    given = {
        "task": "text-classification",
        "teacher": "me/model",
        "data": {"train": str(tmp_path / "a.csv"), "labels": labels},
        "student": {"layers": layers},
        "training": {"epochs": epochs},
        "output": str(tmp_path / "made"),
        "seed": seed,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    assert read_recipe(path) == Recipe.model_validate(given)


def test_the_targets_run_under_atheris(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    script = Path(__file__).with_name("fuzz_parsers.py")
    done = subprocess.run(
        [sys.executable, script, "read_index", "-runs=200", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
