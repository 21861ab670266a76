"""The core knows no method; each method's page can be made from its file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_compress
from hf_compress import registry

CORE = sorted(Path(hf_compress.__file__).parent.rglob("*.py"))
OWN = {name: entry for name, entry in registry.catalogue().methods.items() if entry.distribution == registry.OWN}
ORDINARY = {"features"}
"""Methods whose name is an everyday word of the libraries below us, which identifiers may be."""


def docstrings(tree: ast.AST) -> set[int]:
    """Strings that stand alone: of modules, classes, functions and attributes."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    left_out = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.lineno, node.value


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield line, word


def words(text: str) -> set[str]:
    """Its parts, also of dotted names and of names with underscores, in lower case."""
    return set(re.findall(r"[a-z0-9]+", text.lower())) | {text.lower().rpartition(".")[2]}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_has_no_method_in_its_code(path: Path) -> None:
    """Neither as an identifier nor as a whole literal; an error's text may name one as its remedy (next test)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    named = [
        f"{path.name}:{line}: {word}"
        for line, word in identifiers(tree)
        if words(word) & {name for name in OWN if name not in ORDINARY}
    ]
    named += [f"{path.name}:{line}: {word!r}" for line, word in literals(tree) if word.lower() in OWN]

    assert not named


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_method_that_a_message_recommends_is_there(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    recommended = {name for _, text in literals(tree) for name in re.findall(r"method=\[?['\"]([a-z_0-9]+)['\"]", text)}

    assert recommended <= set(OWN)


def test_the_core_is_looked_at_and_a_name_in_it_would_be_found() -> None:
    tree = ast.parse("from x.taid import TAID as other\nkind = 'kd'\n'''taid'''\n")

    assert [word for _, word in identifiers(tree) if words(word) & {"taid"}] == ["x.taid", "TAID"]
    assert [word for _, word in literals(tree)] == ["kd"]
    assert len(CORE) > 20


@pytest.mark.parametrize("name", OWN)
def test_a_methods_page_can_be_made(name: str) -> None:
    """Title, paper, authors, year, summary and citation agree with each other and with the module's docstring."""
    entry = OWN[name]
    declared, page = entry.declared, ast.get_docstring(ast.parse(entry.path.read_text(encoding="utf-8"))) or ""
    identifier = declared["paper"].removeprefix("arXiv:")
    lead = page.partition("\n")[0]

    assert declared["paper"].startswith("arXiv:")
    assert declared["paper"] in page, "the docstring does not cite the paper"
    assert identifier in declared["bibtex"]
    assert f"year = {{{declared['year']}}}" in declared["bibtex"]
    assert declared["authors"].split(", ")[0].split()[-1] in declared["bibtex"]
    assert lead.endswith(".")
    assert len(lead) < 120
    assert re.fullmatch(r"[A-Z][^\n]*\.", declared["summary"])
    assert declared["bibtex"].count("{") == declared["bibtex"].count("}")
    assert set(entry.default_for) <= set(entry.tasks)


@pytest.mark.parametrize("name", OWN)
def test_everything_public_of_a_method_is_documented(name: str) -> None:
    """Classes, functions and each field of a config, the field with its source or reason."""
    tree = ast.parse(OWN[name].path.read_text(encoding="utf-8"))
    lacking = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            lacking.append(node.name)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            lacking += [
                f"{node.name}.{ast.unparse(field.target)}"
                for field, after in zip(node.body, [*node.body[1:], None], strict=True)
                if isinstance(field, ast.AnnAssign)
                and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
            ]

    assert not lacking
