"""Methods are found without being imported; a stranger's broken one is reported and takes no other down."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import metadata
from pathlib import Path

import pytest

from hf_compress import registry
from hf_compress.errors import ConfigurationError, PluginError, UnknownNameError

OURS = ("features", "gkd", "kd", "minilm", "taid")

GOOD = '''"""A method, arXiv:0000.00000."""
from hf_compress.objective import Objective
from hf_compress.registry import Method

class Mine(Objective):
    pass

METHOD = Method(
    title="Mine", paper="arXiv:0000.00000", authors="A. Stranger", year=2026, summary="Nothing.", bibtex="@misc{mine}",
    tasks=("text-classification",), objective=Mine,
)
'''

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.catalogue.cache_clear()
    yield
    registry.catalogue.cache_clear()
    for name in [name for name in sys.modules if name.startswith("stranger_")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a distribution that registers one family with the given modules."""

    def make(distribution: str, family: str, modules: dict[str, str], package: str | None = None) -> Path:
        package = package or f"stranger_{family}"
        root = tmp_path / distribution
        folder = root / package
        folder.mkdir(parents=True)
        for name, source in {"__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(source, encoding="utf-8", errors="surrogateescape")
        info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{family} = {package}\n")
        monkeypatch.syspath_prepend(root)
        importlib.invalidate_caches()
        return folder

    return make


def test_our_methods_are_all_there_and_none_is_broken() -> None:
    own = {name: entry for name, entry in registry.catalogue().methods.items() if entry.distribution == registry.OWN}

    assert set(OURS) <= set(own)
    assert not [where for where in registry.catalogue().broken if registry.OWN in where]


@pytest.mark.parametrize("name", sorted(registry.catalogue().methods))
def test_what_is_parsed_equals_what_is_imported(name: str) -> None:
    entry = registry.get(name)
    method = entry.load()

    for field in fields(registry.Method):
        imported = getattr(method, field.name)
        if field.name in registry.PARTS:
            assert (imported is None) == (field.name not in entry.parts), field.name
        else:
            assert entry.declared.get(field.name, field.default) == imported, field.name
    assert entry.tasks == method.tasks
    assert entry.default_for == method.default_for
    assert entry.path.stem == name
    assert entry.module == f"hf_compress_plugins.{entry.family}.{name}"


def test_listing_imports_no_method_and_no_torch() -> None:
    code = (
        "import sys; from hf_compress import registry; assert len(registry.catalogue().methods) >= 5;"
        "registry.default_for('text-classification');"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('hf_compress_plugins.') and m.count('.') > 1])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


WITHOUT_DEFAULT = {
    "image-feature-extraction",
    "unconditional-image-generation",
    "audio-to-audio",
    "graph-ml",
    "text-ranking",
}


def test_every_task_has_a_default_that_can_be_loaded() -> None:
    for task in registry.TASKS:
        entries = registry.default_for(task)
        assert bool(entries) == (task not in WITHOUT_DEFAULT), task
        assert all(task in entry.tasks and entry.load().objective is not None for entry in entries)


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"There is no task 'text-clasification'\. Did you mean 'text-class"):
        registry.default_for("text-clasification")


def test_an_unknown_method_lists_the_nearest_or_else_all() -> None:
    with pytest.raises(UnknownNameError, match=r"There is no method 'tiad'\. Did you mean 'taid'") as near:
        registry.get("tiad")
    with pytest.raises(UnknownNameError, match=f"Known: .*{', '.join(OURS[:1])}"):
        registry.get("zzzzzz")

    assert near.value.near[0] == "taid"
    assert isinstance(near.value, KeyError)


def test_a_method_without_an_objective_cannot_teach() -> None:
    none = [name for name, entry in registry.catalogue().methods.items() if "objective" not in entry.parts]
    assert none
    for name in none:
        with pytest.raises(ConfigurationError, match=f"'{name}' has no objective to train with"):
            registry.objective(name)


def test_errors_survive_the_way_to_another_process() -> None:
    error = UnknownNameError("method", "tiad", ["taid", "kd"])

    copied = pickle.loads(pickle.dumps(error))

    assert (str(copied), copied.near) == (str(error), ["taid"])


def test_a_third_partys_method_is_found_and_loads(install: Install) -> None:
    folder = install("stranger-methods", "outside", {"mine": GOOD, "_shared": "raise RuntimeError"})

    entry = registry.get("mine")

    assert (entry.family, entry.distribution, entry.path) == ("outside", "stranger-methods", folder / "mine.py")
    assert entry.parts == {"objective": "Mine"}
    assert "stranger_outside.mine" not in sys.modules
    assert entry.load().title == "Mine"
    assert "_shared" not in registry.catalogue().methods
    assert not registry.catalogue().broken


def test_without_its_extra_a_method_says_how_to_install_it(install: Install) -> None:
    source = "import graphs_of_nobody\n" + GOOD.partition("\n")[2].replace("year=2026", "year=2026, extra='graphs'")
    install("stranger-methods", "outside", {"mine": source})
    line = r"'mine' needs graphs_of_nobody, .* pip install 'stranger-methods\[graphs\]'"

    with pytest.raises(PluginError, match=line):
        registry.get("mine").load()


def test_the_extras_of_our_methods_exist() -> None:
    known = metadata(registry.OWN).get_all("Provides-Extra")

    for entry in registry.catalogue().methods.values():
        if entry.distribution == registry.OWN:
            assert entry.declared.get("extra") in (None, *known), entry.name


BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", r"broken.py, line 2: cannot be parsed \(SyntaxError"),
    "bytes": ("# \udcff\n", r"broken.py: cannot be parsed \(UnicodeDecodeError"),
    "nested": ("x = " + "(" * 5000 + "1" + ")" * 5000, r"broken.py.*: cannot be parsed"),
    "none": ("x = 1\n", r"broken.py: expected one top-level `METHOD = Method\(...\)`, found 0"),
    "two": (GOOD + GOOD, r"broken.py: expected one .*, found 2 in lines 8, 19"),
    "one of two is no call": (GOOD + "METHOD = None\n", r"found 2 in lines 8, 12"),
    "another call": (GOOD.replace("METHOD = Method(", "METHOD = dict("), r"broken.py, line 8: METHOD must be `Method"),
    "not a call": ("METHOD = 3\n", r"broken.py, line 1: METHOD must be `Method"),
    "positional": (GOOD.replace('title="Mine"', '"Mine"'), r"broken.py, line 8: METHOD must be `Method"),
    "no literal": (GOOD.replace("year=2026", "year=int('2026')"), r"broken.py, line 9: year must be a literal"),
    "unhashable": (GOOD.replace("year=2026", "year={[]: 1}"), r"broken.py, line 9: year must be a literal"),
    "no year": (GOOD.replace("year=2026", "year='2026'"), r"broken.py, line 9: year must be int, got '2026'"),
    "no text": (GOOD.replace('title="Mine"', 'title=""'), r"broken.py, line 9: title must be str, got ''"),
    "unknown keyword": (GOOD.replace("year=2026", "yaer=2026"), r"broken.py, line 9: Method has no keyword 'yaer'"),
    "keywords from elsewhere": (GOOD.replace("year=2026", "**more"), r"broken.py, line 9: Method has no keyword None"),
    "missing keyword": (GOOD.replace("year=2026, ", ""), r"broken.py: METHOD lacks \['year'\]"),
    "no part": (GOOD.replace("objective=Mine,", ""), r"broken.py: METHOD has no part"),
    "unknown task": (
        GOOD.replace("text-classification", "chess"),
        r"line 10: unknown names \['chess'\] in tasks; known:",
    ),
    "unknown default": (
        GOOD.replace("objective=Mine", "default_for=('chess',), objective=Mine"),
        r"line 10: unknown names \['chess'\] in default_for",
    ),
    "tasks as text": (GOOD.replace('("text-classification",)', '"fill-mask"'), r"tasks must be a tuple of names"),
    "tasks as number": (GOOD.replace('("text-classification",)', "5"), r"tasks must be a tuple of names, got 5"),
    "default None": (
        GOOD.replace("objective=Mine", "default_for=None, objective=Mine"),
        r"default_for must be a tuple",
    ),
    "part by expression": (
        GOOD.replace("objective=Mine", "objective=Mine()"),
        r"line 10: objective must be the bare name",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_module_that_cannot_be_read_is_reported_and_the_others_work(kind: str, install: Install) -> None:
    """With file, line and distribution."""
    source, message = BROKEN[kind]
    install("stranger-methods", "outside", {"broken": source, "mine": GOOD})

    found = registry.catalogue()

    assert {"mine", *OURS} <= set(found.methods)
    assert "broken" not in found.methods
    assert list(found.broken) == ["outside.broken (stranger-methods)"]
    with pytest.raises(PluginError, match=message) as error:
        registry.get("broken")
    assert "stranger-methods" in str(error.value)


def test_a_module_that_may_not_be_read_is_reported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("stranger-methods", "outside", {"broken": GOOD, "mine": GOOD})
    read = Path.read_text

    def refuse(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "broken.py":
            raise PermissionError("no")
        return read(path, *args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Path, "read_text", refuse)

    assert "mine" in registry.catalogue().methods
    assert "PermissionError" in registry.catalogue().broken["outside.broken (stranger-methods)"]


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"__init__": "raise RuntimeError('at import')"}, "RuntimeError: at import"),
        ({"__init__": "raise SystemExit(3)"}, "SystemExit: 3"),
        ({"__init__": "import nothing_of_this_name"}, "ModuleNotFoundError"),
    ],
)
def test_a_family_whose_parent_fails_to_import_is_reported(
    modules: dict[str, str], said: str, install: Install
) -> None:
    folder = install("stranger-methods", "outside", modules, package="stranger_parent")
    (folder / "methods").mkdir()
    (folder / "methods" / "mine.py").write_text(GOOD)
    points = next(folder.parent.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(f"[{registry.GROUP}]\noutside = stranger_parent.methods\n")

    found = registry.catalogue()

    assert set(OURS) <= set(found.methods)
    assert list(found.broken) == ["outside (stranger-methods)"]
    assert said in found.broken["outside (stranger-methods)"]


@pytest.mark.parametrize("value", ["no_package_of_this_name", "json.decoder", "not a name", "json:loads"])
def test_a_family_that_is_no_package_is_reported(value: str, install: Install) -> None:
    install("stranger-methods", "outside", {}, package="stranger_there")
    folder = install("stranger-other", "elsewhere", {"mine": GOOD})
    points = next(folder.parent.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(f"[{registry.GROUP}]\nelsewhere = stranger_elsewhere\nwrong = {value}\n")

    found = registry.catalogue()

    assert "mine" in found.methods
    assert list(found.broken) == ["wrong (stranger-other)"]


@pytest.mark.parametrize("source", ["raise ValueError('late')", "raise SystemExit(1)", "import nothing_of_this_name"])
def test_a_method_that_fails_to_import_names_its_distribution(source: str, install: Install) -> None:
    install("stranger-methods", "outside", {"mine": GOOD + source})

    with pytest.raises(PluginError, match="method 'mine' of distribution 'stranger-methods' cannot be imported: "):
        registry.get("mine").load()


def test_a_declaration_of_another_class_is_refused_when_loaded(install: Install) -> None:
    source = GOOD.replace("from hf_compress.registry import Method", "class Method(dict): pass")
    install("stranger-methods", "outside", {"mine": source})

    with pytest.raises(PluginError, match=r"stranger_outside\.mine: METHOD is a Method, not a Method"):
        registry.get("mine").load()


def test_no_stranger_replaces_one_of_our_methods(install: Install) -> None:
    """Whatever the family is called: `aaa` sorts before ours."""
    install("aaa-methods", "aaa", {"kd": GOOD, "mine": GOOD})

    found = registry.catalogue()

    assert found.methods["kd"].distribution == registry.OWN
    assert found.methods["mine"].distribution == "aaa-methods"
    assert found.broken == {"aaa.kd (aaa-methods)": "'kd' is also a method of general (hf-compress), which is used."}


def test_of_two_strangers_methods_of_one_name_the_second_is_reported(install: Install) -> None:
    install("one-methods", "zebra", {"mine": GOOD})
    install("two-methods", "ant", {"mine": GOOD})

    found = registry.catalogue()

    assert found.methods["mine"].distribution == "two-methods"
    assert list(found.broken) == ["zebra.mine (one-methods)"]


def test_hidden_files_are_no_methods(install: Install) -> None:
    install("stranger-methods", "outside", {"mine": GOOD, "._mine": "\udcff"})

    assert not registry.catalogue().broken


# ---------------------------------------------------------------------- taxonomies


def test_every_method_of_ours_is_tagged_as_its_parts_ask() -> None:
    """A loss has targets that come from somewhere, and what makes data small does so in some way."""
    own = [entry for entry in registry.catalogue().methods.values() if entry.distribution == registry.OWN]
    for entry in own:
        if "objective" in entry.parts:
            assert entry.classes("algorithm"), entry.name
            assert entry.classes("knowledge"), entry.name
        assert bool(entry.classes("dataset")) == ("synthesis" in entry.parts), entry.name


@pytest.mark.parametrize("taxonomy", registry.CLASSES)
def test_the_classes_hold_the_methods_that_name_them_and_empty_ones_are_there(taxonomy: str) -> None:
    found = registry.by_class(taxonomy)
    assert list(found) == list(registry.CLASSES[taxonomy])
    for name, entry in registry.catalogue().methods.items():
        assert {one for one, own in found.items() if name in own} == set(entry.classes(taxonomy))


def test_an_unknown_class_or_taxonomy_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="knowledge"):
        registry.by_class("knowlege")
    assert registry._wrong("algorithm", ("chess",)) is not None
    assert registry._wrong("algorithm", ("ranking",)) is None
