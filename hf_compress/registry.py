"""Families (entry points) and methods (module names), found without importing a method.

A distribution registers a family with one line in the entry-point group `hf_compress.families`; its methods are the
family's modules. Listing reads each module's source and takes the keywords of its one top-level `METHOD = Method(...)`:
literals, and bare names for the parts. Adding a method adds a file and edits none.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, PluginError, UnknownNameError
from .parts import PARTS, Ranking

if TYPE_CHECKING:
    from .objective import Objective

GROUP = "hf_compress.families"
OWN = "hf-compress"
"""The distribution whose methods no other can replace."""

TASKS = (
    "text-classification",
    "text-regression",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "text2text-generation",
    "feature-extraction",
    "image-classification",
    "audio-classification",
    "automatic-speech-recognition",
    "image-feature-extraction",
    "unconditional-image-generation",
    "audio-to-audio",
    "graph-ml",
    "text-ranking",
)
"""The hub's task names, and `text-regression` for a single real-valued output. The last five have no default method."""

CLASSES: Mapping[str, Mapping[str, str]] = {
    "algorithm": {
        "supervised": "likelihood of what a teacher has written or labelled",
        "divergence": "a divergence between the two models' distributions",
        "similarity": "a distance between the two models' inner states",
        "reinforcement": "a reward, with a policy gradient",
        "ranking": "an order of answers or classes",
    },
    "knowledge": {
        "labelling": "the teacher answers or labels what is given",
        "expansion": "the teacher makes further examples from a few",
        "curation": "data is chosen or written by what is known of it",
        "feature": "the teacher's distributions or states on each example",
        "feedback": "the teacher judges, ranks or corrects what the student has made",
        "self": "the student is its own teacher",
    },
    "dataset": {
        "gradient matching": "small data that gives the gradients of the large",
        "trajectory matching": "small data that trains along the same way",
        "distribution matching": "small data with the same features",
        "kernel regression": "small data whose kernel regression fits the large",
        "generation": "a model writes or draws the small data",
        "selection": "the small data are rows of the large",
    },
}
"""What a method may be tagged with, by taxonomy, with what each class means.

The first two are those of Xu et al.: A Survey on Knowledge Distillation of Large Language Models, 2024,
arXiv:2402.13116; the third follows Fang et al.: Knowledge Distillation and Dataset Distillation of Large Language
Models, 2025, arXiv:2504.14772, with the kinds of optimisation that its section on it names and kernels beside them.
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method's module declares. Its name is the module's, its kinds are the parts that it has."""

    title: str
    paper: str
    """Identifier, e.g. "arXiv:2501.16937"."""
    authors: str
    year: int
    summary: str
    """One sentence."""
    bibtex: str
    tasks: tuple[str, ...]
    default_for: tuple[str, ...] = ()
    """Tasks for which this method is part of the default."""
    algorithm: tuple[str, ...] = ()
    """How targets enter the loss; these three are of `CLASSES`."""
    knowledge: tuple[str, ...] = ()
    """Where targets come from."""
    dataset: tuple[str, ...] = ()
    """How training data is made small."""
    extra: str | None = None
    """The extra of its distribution whose packages its module imports."""
    objective: type[Objective] | None = None
    preparation: Callable[..., Any] | None = None
    generation: Callable[..., Any] | None = None
    synthesis: Callable[..., Any] | None = None
    search: Callable[..., Ranking] | None = None
    student: Callable[..., Any] | None = None
    tokenizer: Callable[..., Any] | None = None
    recipe: Mapping[str, Any] | None = None
    """The parts, see `hf_compress.parts`."""


_LITERALS = {f.name for f in fields(Method)} - set(PARTS)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method as its source declares it, unimported."""

    name: str
    family: str
    module: str
    distribution: str
    path: Path
    declared: Mapping[str, Any]
    """The literal keywords of `Method(...)`."""
    parts: Mapping[str, str]
    """Part to the bare name that it is bound to."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.declared["tasks"])

    @property
    def default_for(self) -> tuple[str, ...]:
        return tuple(self.declared.get("default_for", ()))

    def classes(self, taxonomy: str) -> tuple[str, ...]:
        """Its classes in one of the taxonomies of `CLASSES`."""
        return tuple(self.declared.get(taxonomy, ()))

    def load(self) -> Method:
        """Imports the method's module.

        Raises:
            PluginError: if the import fails, with the distribution that ships it, or the line that installs its extra.
        """
        try:
            method = importlib.import_module(self.module).METHOD
        except (Exception, SystemExit) as error:
            extra = self.declared.get("extra")
            if extra and isinstance(error, ModuleNotFoundError):
                raise PluginError(
                    f"method {self.name!r} needs {error.name}, which is not installed: "
                    f"pip install '{self.distribution}[{extra}]'"
                ) from error
            raise PluginError(
                f"method {self.name!r} of distribution {self.distribution!r} cannot be imported: "
                f"{type(error).__name__}: {error}. Reinstall or update that distribution."
            ) from error
        if not isinstance(method, Method):
            raise PluginError(f"{self.module}: METHOD is a {type(method).__name__}, not a Method.")
        return method


@dataclass(frozen=True)
class Catalogue:
    """All methods that can be listed, and the families that cannot, by reason."""

    methods: Mapping[str, Entry] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)


@cache
def catalogue() -> Catalogue:
    """Reads every family once. A family or method that cannot be read is reported in `broken`, the others work.

    Of two methods of one name our own is used, else that of the first family by name; the other one is reported.
    """
    methods: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    found = [(point.dist.name if point.dist else "unknown distribution", point) for point in entry_points(group=GROUP)]
    for distribution, point in sorted(found, key=lambda pair: (pair[0] != OWN, pair[1].name, pair[0])):
        where = f"{point.name} ({distribution})"
        try:
            paths = _modules(point)
        except (Exception, SystemExit) as error:  # a stranger's package may raise anything while its parent is imported
            broken[where] = f"{type(error).__name__}: {error}"
            continue
        for path in paths:
            try:
                entry = _read(path, point, distribution)
            except PluginError as error:
                broken[f"{point.name}.{path.stem} ({distribution})"] = str(error)
                continue
            if entry.name in methods:
                other = methods[entry.name]
                broken[f"{point.name}.{entry.name} ({distribution})"] = (
                    f"{entry.name!r} is also a method of {other.family} ({other.distribution}), which is used."
                )
                continue
            methods[entry.name] = entry
    return Catalogue(methods, broken)


def get(name: str) -> Entry:
    """The method of that name.

    Raises:
        UnknownNameError: with the nearest names.
        PluginError: if a method of that name is there but cannot be read.
    """
    found = catalogue()
    if name in found.methods:
        return found.methods[name]
    for where, reason in found.broken.items():
        if where.split(" ")[0].rpartition(".")[2] == name:
            raise PluginError(f"method {where} cannot be used: {reason}")
    raise UnknownNameError("method", name, found.methods)


def objective(name: str) -> type[Objective]:
    """The class of the objective of the method of that name.

    Raises:
        UnknownNameError: with the nearest names.
        PluginError: if the method cannot be read or imported.
        ConfigurationError: for a method that has none.
    """
    found = get(name).load().objective
    if found is None:
        raise ConfigurationError(
            f"method {name!r} has no objective to train with, it is a {' and a '.join(get(name).parts)}; "
            "see `hf-compress methods`."
        )
    return found


def default_for(task: str) -> tuple[Entry, ...]:
    """The methods that together are the default of a task, by name."""
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    return tuple(entry for _, entry in sorted(catalogue().methods.items()) if task in entry.default_for)


def by_class(taxonomy: str) -> dict[str, tuple[str, ...]]:
    """The methods of each class of a taxonomy by name, classes without any among them.

    Raises:
        UnknownNameError: for a taxonomy that is not in `CLASSES`.
    """
    if taxonomy not in CLASSES:
        raise UnknownNameError("taxonomy", taxonomy, CLASSES)
    entries = sorted(catalogue().methods.items())
    return {one: tuple(name for name, entry in entries if one in entry.classes(taxonomy)) for one in CLASSES[taxonomy]}


def _modules(point: EntryPoint) -> list[Path]:
    spec: ModuleSpec | None = find_spec(point.value)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"{point.value} is not a package.")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return sorted(path for folder in folders for path in folder.glob("*.py") if path.stem[0] not in "_.")


def _declaration(tree: ast.Module, path: Path) -> ast.Call:
    """The right-hand side of the one top-level `METHOD = Method(...)`."""
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and "METHOD" in [ast.unparse(target) for target in node.targets]
    ]
    if len(found) != 1:
        lines = f" in lines {', '.join(str(node.lineno) for node in found)}" if found else ""
        raise PluginError(f"{path.name}: expected one top-level `METHOD = Method(...)`, found {len(found)}{lines}.")
    call = found[0].value
    if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func).rpartition(".")[2] != "Method":
        raise PluginError(f"{path.name}, line {call.lineno}: METHOD must be `Method(...)` with keywords alone.")
    return call


def _wrong(keyword: str, value: Any) -> str | None:
    """What is wrong with a declared value: text, a year, tuples of known names."""
    known = {"tasks": TASKS, "default_for": TASKS, **CLASSES}.get(keyword)
    if known is None:
        kind = int if keyword == "year" else str
        return None if isinstance(value, kind) and value else f"{keyword} must be {kind.__name__}, got {value!r}."
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        return f"{keyword} must be a tuple of names, got {value!r}."
    unknown = [name for name in value if name not in known]
    return f"unknown names {unknown} in {keyword}; known: {', '.join(known)}." if unknown else None


def _read(path: Path, point: EntryPoint, distribution: str) -> Entry:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise PluginError(f"{path.name}{line}: cannot be parsed ({type(error).__name__}: {error}).") from error
    declared: dict[str, Any] = {}
    parts: dict[str, str] = {}
    for keyword in _declaration(tree, path).keywords:
        where = f"{path.name}, line {keyword.value.lineno}"
        if keyword.arg in _LITERALS:
            try:
                declared[keyword.arg] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
                raise PluginError(f"{where}: {keyword.arg} must be a literal.") from error
            if problem := _wrong(keyword.arg, declared[keyword.arg]):
                raise PluginError(f"{where}: {problem}")
        elif keyword.arg in PARTS and isinstance(keyword.value, ast.Name):
            parts[keyword.arg] = keyword.value.id
        elif keyword.arg in PARTS:
            raise PluginError(f"{where}: {keyword.arg} must be the bare name of an object of this module.")
        else:
            raise PluginError(f"{where}: Method has no keyword {keyword.arg!r}.")
    missing = {"title", "paper", "authors", "year", "summary", "bibtex", "tasks"} - set(declared)
    if missing:
        raise PluginError(f"{path.name}: METHOD lacks {sorted(missing)}.")
    if not parts:
        raise PluginError(f"{path.name}: METHOD has no part; parts are {', '.join(PARTS)}.")
    return Entry(
        name=path.stem,
        family=point.name,
        module=f"{point.value}.{path.stem}",
        distribution=distribution,
        path=path,
        declared=declared,
        parts=parts,
    )
