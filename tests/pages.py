"""Pages that are generated: the gallery of methods, the demo's table, results, and what the tests run on."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import cases
import families
import features
from hf_compress_evaluation import bench, claims, deployment, draft, encoders, narrowing, scaling
from hf_compress_evaluation import gallery as students
from hf_compress_evaluation.demo.summary import markdown

from hf_compress import registry

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"


def pages(root: Path) -> dict[Path, str]:
    """Every generated page of a checkout, by path."""
    return {
        root / "plugins" / "README.md": gallery(),
        root / "README.md": front(root),
        root / "evaluation" / "README.md": results(root),
        root / "tests" / "README.md": tried(root),
        root / "tests" / "faults" / "README.md": lost(root),
    }


def tried(root: Path) -> str:
    """The page of the tests: families, features, reported faults."""
    page, text = root / "tests" / "README.md", None
    for mark, made in (("families", families.markdown()), ("features", features.markdown()), ("cases", cases.render())):
        text = between(page, mark, made, text)
    assert text is not None  # there are marks
    return text


def front(root: Path) -> str:
    """The first page, with the demo's table and the gallery of students."""
    page = root / "README.md"
    text = between(page, "beside", beside(root), between(page, "demo", demo(root)))
    return between(page, "gallery", students.markdown(root / "evaluation" / "results" / "gallery"), text)


def lost(root: Path) -> str:
    """The page of the faults, with the table of what `ci/faults` counted."""
    page, found = (root / "tests" / "faults" / name for name in ("README.md", "results.json"))
    if not found.exists():
        return between(page, "faults", "")
    row = json.loads(found.read_text(encoding="utf-8"))
    lines = ["| promise | tried | survived | lost | of them |", "|---|---|---|---|---|"]
    for promise, counts in row["promises"].items():
        named = {name: n for name, n in counts.items() if name not in ("tried", "survived", "lost")}
        kinds = ", ".join(f"{name} {n}" for name, n in named.items()) if len(named) < 20 else f"{len(named)} kinds"
        values = (promise, counts["tried"], counts.get("survived", 0), counts.get("lost", 0), kinds)
        lines.append(f"| {' | '.join(map(str, values))} |")
    lines += ["", f"`{row['command']}`, {row['date']}, {row['machine']}."]
    return between(page, "faults", "\n".join(lines))


def results(root: Path) -> str:
    """The page of the results: benches, deployment, narrowing, a draft and claims."""
    page, text = root / "evaluation" / "README.md", None
    parts = {
        "bench": benched(root),
        "scaling": scaling.markdown(),
        "deployment": deployed(root),
        "narrowing": narrowed(root),
        "encoders": encoders.markdown(root / "evaluation" / "results" / "encoders"),
        "draft": drafted(root),
        "claims": claimed(root),
    }
    for mark, made in parts.items():
        text = between(page, mark, made, text)
    assert text is not None  # there are marks
    return text


def between(page: Path, mark: str, generated: str, text: str | None = None) -> str:
    """The page, or a text made from it, with the generated text between its marks."""
    text = page.read_text(encoding="utf-8") if text is None else text
    begin, end = BEGIN.format(mark), END.format(mark)
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{generated}\n{end}{rest.partition(end)[2]}"


def demo(root: Path) -> str:
    """The table of the demo's committed results."""
    results = root / "evaluation" / "results" / "demo.json"
    return markdown(json.loads(results.read_text(encoding="utf-8"))) if results.exists() else ""


def deployed(root: Path) -> str:
    """The table of the models that were exported and measured."""
    found = root / "evaluation" / "results" / "deployment.json"
    return deployment.markdown(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else ""


def narrowed(root: Path) -> str:
    """The table of what width costs."""
    found = root / "evaluation" / "results" / "narrowing.json"
    return narrowing.markdown(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else ""


def drafted(root: Path) -> str:
    """The table of drafts of a real target."""
    found = root / "evaluation" / "results" / "draft.json"
    return draft.markdown(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else ""


def benched(root: Path) -> str:
    """The table of the committed benches."""
    found = root / "evaluation" / "results" / "bench.json"
    return bench.markdown(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else ""


def beside(root: Path) -> str:
    """The table of the benches beside other packages."""
    found = root / "evaluation" / "results" / "bench.json"
    return bench.beside(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else ""


def claimed(root: Path) -> str:
    """A section for each claim with committed results, by name."""
    results = sorted((root / "evaluation" / "results" / "claims").glob("*.json"))
    return "\n".join(claims.markdown(json.loads(path.read_text(encoding="utf-8"))) for path in results)


def gallery() -> str:
    """One section a method: what it is, its equation, its settings with their sources, how to cite it."""
    entries = registry.catalogue().methods
    parts = [
        "# Methods\n\nWritten by `ci/docs` from the methods' sources. `hf-compress methods --task TASK` lists a task's "
        "default first.\n",
        "| method | family | default for | paper | what it does |\n|---|---|---|---|---|",
    ]
    for name, entry in sorted(entries.items()):
        declared = entry.declared
        parts[-1] += (
            f"\n| [{name}](#{name}) | {entry.family} | {', '.join(entry.default_for)} | {declared['paper']} "
            f"| {declared['summary']} |"
        )
    return "\n".join([*parts, taxonomies()]) + "\n" + "".join(section(name) for name in sorted(entries))


def taxonomies() -> str:
    """The methods by class of each taxonomy, empty classes among them."""
    lines = ["\n## By taxonomy\n", "As `hf-compress methods --by algorithm`, `knowledge` or `dataset` shows them.\n"]
    lines += ["| taxonomy | class | what it is | methods |", "|---|---|---|---|"]
    for taxonomy, classes in registry.CLASSES.items():
        for name, own in registry.by_class(taxonomy).items():
            linked = ", ".join(f"[{one}](#{one})" for one in own) or "none yet"
            lines.append(f"| {taxonomy} | {name} | {classes[name]} | {linked} |")
    return "\n".join(lines)


def section(name: str) -> str:
    """A method's page."""
    entry = registry.get(name)
    module = importlib.import_module(entry.module)
    declared = entry.declared
    lines = [
        f"\n## {name}\n",
        f"{declared['title']}. {declared['authors']}, {declared['year']}, {declared['paper']}.\n",
        f"Tasks: {', '.join(entry.tasks)}.\n",
        "```text",
        inspect.cleandoc(module.__doc__ or ""),
        "```\n",
    ]
    objective = registry.get(name).load().objective
    if objective is not None:
        lines += ["| setting | default | |", "|---|---|---|", *settings(module, objective.Config), ""]
    return "\n".join(lines)


def settings(module: ModuleType, config: type) -> list[str]:
    """Rows of a config's fields with the text below each in the source."""
    tree = ast.parse(inspect.getsource(module))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config.__name__)
    said = {
        field.target.id: re.sub(r"\s+", " ", text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    return [
        f"| `{field.name}` | `{field.default!r}` | {said.get(field.name, '')} |" for field in dataclasses.fields(config)
    ]
