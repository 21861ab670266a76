"""Files and folders stay whole when a write fails at any point; foreign text and paths are bounded."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import pickle
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_compress import files
from hf_compress.errors import ForeignFileError

Action = Callable[[Path], None]
NAMES = ["plain", "two words", "Übung 模型 🤗", "n" * 240]


def fill(target: Path, text: str) -> None:
    """A folder of two files."""
    with files.atomic_folder(target) as part:
        (part / "a.txt").write_text(text)
        (part / "below").mkdir()
        (part / "below" / "b.txt").write_text(text)


def content(target: Path) -> dict[str, str]:
    return {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"a.txt": text, "below/b.txt": text}


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`th call, from 0, that opens, syncs or renames fails as on a full disk."""
    calls = itertools.count()

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open")):
        wrap(owner, name)


def until_nothing_fails(
    action: Action, path: Path, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Fails the first call, then the second, ... until the action succeeds; after each `check` must pass."""
    for number in range(50):
        with monkeypatch.context() as patched:
            failing(patched, number)
            try:
                action(path)
            except OSError:
                failed = True
            else:
                failed = False
        if not failed:
            assert number >= least, f"only {number} calls could fail"
            return
        check()
    raise AssertionError("the action never succeeds")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_written_under_any_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    files.write_text(path, "one ü\r\n")
    files.write_text(path, "two\n")

    assert path.read_bytes() == b"two\n"
    assert os.listdir(tmp_path) == [name]


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    def check() -> None:
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["record.json"]

    until_nothing_fails(lambda p: files.write_text(p, "new"), path, check, monkeypatch, least=3)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["record.json"]


def test_text_that_is_no_text_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "lone surrogate \ud800")

    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_interrupt_is_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "new")
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "folder", "new")

    assert os.listdir(tmp_path) == []


def test_text_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), sync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])

    files.write_text(tmp_path / "a", "new")
    fill(tmp_path / "folder", "new")

    assert order[:4] == ["fsync", "rename", "fsync", "fsync"]
    assert set(order[4:]) == {"rename"}


@pytest.mark.parametrize("old", [True, False])
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    if old:
        fill(target, "old")

    def check() -> None:
        assert os.listdir(tmp_path) == (["model"] if old else [])
        assert not old or content(target) == whole("old")

    until_nothing_fails(lambda p: fill(p, "new"), target, check, monkeypatch, least=6)
    assert content(target) == whole("new")
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_of_the_one_who_fills_it_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, "old")

    def interrupted() -> None:
        with files.atomic_folder(target) as part:
            (part / "a.txt").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()

    assert content(target) == whole("old")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_under_any_name_below_folders_that_are_not_there(name: str, tmp_path: Path) -> None:
    target = tmp_path / "x" / "y" / name

    fill(target, "one")
    fill(target, "two")

    assert content(target) == whole("two")
    assert os.listdir(target.parent) == [name]


def test_what_the_old_folder_held_is_gone(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    (tmp_path / "model" / "stale.txt").write_text("stale")

    fill(tmp_path / "model", "new")

    assert content(tmp_path / "model") == whole("new")


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    fill(tmp_path / "disk" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")

    fill(tmp_path / "model", "new")

    assert (tmp_path / "model").is_symlink()
    assert content(tmp_path / "disk" / "model") == whole("new")
    assert sorted(os.listdir(tmp_path)) == ["disk", "model"]


def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")

    with pytest.raises(NotADirectoryError, match="Remove it or choose another"):
        fill(tmp_path / "model", "new")

    assert (tmp_path / "model").read_text() == "a file"
    assert os.listdir(tmp_path) == ["model"]


def test_permissions_are_those_that_any_new_file_would_get(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "new")
        fill(tmp_path / "model", "new")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_a_folder_that_may_not_be_written_gives_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):  # the administrator may write anywhere
            monkeypatch.setattr(Path, "open", _refuse)
            monkeypatch.setattr(Path, "mkdir", _refuse)
        with pytest.raises(OSError, match="denied"):
            files.write_text(path, "new")
        with pytest.raises(OSError, match="denied"), files.atomic_folder(tmp_path / "model"):
            raise AssertionError("the folder must not be filled")
    finally:
        monkeypatch.undo()
        tmp_path.chmod(0o755)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise PermissionError(13, "Permission denied")


def _write_often(folder: Path, name: str) -> None:
    for turn in range(60):
        text = f"{name} {turn} " * 500
        files.write_text(folder / "a.json", text)
        try:
            fill(folder / "model", text)
        except OSError:  # the other one was faster
            continue


def test_two_processes_on_one_place_leave_the_whole_work_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_write_often, args=(tmp_path, name)) for name in ("one", "two")]
    for process in others:
        process.start()
    while any(process.is_alive() for process in others):
        if (tmp_path / "a.json").exists():
            assert len(set((tmp_path / "a.json").read_text().split()[::2])) == 1
    for process in others:
        process.join()

    found = content(tmp_path / "model")
    assert [process.exitcode for process in others] == [0, 0]
    assert found == whole(found["a.txt"])
    assert sorted(os.listdir(tmp_path)) == ["a.json", "model"]


def test_another_process_that_takes_the_place_meanwhile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames: ours is dropped, and the old folder, outdated by then, too."""
    fill(tmp_path / "model", "old")
    replace, calls = Path.replace, itertools.count()

    def interfered(path: Path, target: Path) -> Path:
        if next(calls) == 1:
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "a.txt").write_text("theirs")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interfered)
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "model", "new")

    assert content(tmp_path / "model") == {"a.txt": "theirs"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["a.txt", "below/b.txt", "below/../a.txt", "./a.txt", "Übung 1.txt", "link"])
def test_names_within_the_folder_are_resolved(name: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to("a.txt")

    assert files.inside(tmp_path, name) == (tmp_path / name).resolve()


@pytest.mark.parametrize(
    "name",
    ["../a", "below/../../a", "/etc/passwd", "out", "out/passwd", "..", "zero\0byte", "loop", "below/../../folder2/a"],
)
def test_names_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "folder2").mkdir()
    (folder / "out").symlink_to("/etc")
    (folder / "loop").symlink_to("loop")

    with pytest.raises(ForeignFileError, match=r"leads out of its folder|cannot be resolved") as error:
        files.inside(folder, name)
    assert "from a source you trust" in str(error.value)


def snapshot(root: Path, owner: str = "models--me--model") -> Path:
    """A Hugging Face cache of one file at the top and one in a folder."""
    blobs, folder = root / owner / "blobs", root / owner / "snapshots" / "0a1b2c"
    blobs.mkdir(parents=True)
    (folder / "onnx").mkdir(parents=True)
    (blobs / "1111").write_text("weights")
    (blobs / "2222").write_text("graph")
    (folder / "model.safetensors").symlink_to("../../blobs/1111")
    (folder / "onnx" / "model.onnx").symlink_to("../../../blobs/2222")
    return folder


def test_the_links_of_a_cached_snapshot_are_followed(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)

    for name, text in (("model.safetensors", "weights"), ("onnx/model.onnx", "graph")):
        path = files.inside(folder, name)
        assert (path, path.read_text()) == (folder.resolve() / name, text)
    assert files.inside(folder / "onnx", "model.onnx").read_text() == "graph"


@pytest.mark.parametrize("target", ["../../secret", "../../blobs/deep/secret", "../../blobs/out", "/etc/passwd"])
def test_other_links_of_a_snapshot_are_refused(target: str, tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    repository = folder.parent.parent
    (repository / "blobs" / "deep").mkdir()
    for path in (repository / "secret", repository / "blobs" / "deep" / "secret"):
        path.write_text("secret")
    (repository / "blobs" / "out").symlink_to("/etc/passwd")
    (folder / "file").symlink_to(target)

    with pytest.raises(ForeignFileError, match="leads out"):
        files.inside(folder, "file")


def test_a_name_that_climbs_to_the_blobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="leads out"):
        files.inside(snapshot(tmp_path), "../../blobs/1111")


def test_blobs_that_are_themselves_a_link_are_not_trusted(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1111").write_text("secret")
    blobs = folder.parent.parent / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ForeignFileError, match="leads out"):
        files.inside(folder, "model.safetensors")


def test_a_folder_called_snapshots_elsewhere_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="leads out"):
        files.inside(snapshot(tmp_path, "holidays"), "model.safetensors")


def read(reader: Callable[[Path], dict[str, Any]], folder: Path, raw: str | bytes) -> dict[str, Any]:
    path = folder / "foreign"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return reader(path)


def nested(depth: int) -> str:
    """An object with lists in it, `depth` levels in all."""
    return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_a_json_object_is_read(tmp_path: Path) -> None:
    assert read(files.read_json, tmp_path, '{"a": [1, 2.5, null, "ü"]}') == {"a": [1, 2.5, None, "ü"]}
    assert read(files.read_json, tmp_path, nested(files.MAX_DEPTH))
    assert read(files.read_yaml, tmp_path, nested(files.MAX_DEPTH))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ('{"a": 1} x', "is not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ('{"a": 1, "a": 2}', r"a key appears twice among \['a'\]"),
        ('{"b": {"a": 1, "a": 2}}', "a key appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": [1e999]}', "not finite"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        (nested(files.MAX_DEPTH + 1), "nested deeper than 64 levels"),
        (nested(100_000), "is not valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
    ],
)
def test_json_that_is_not_ours_to_trust_is_refused(raw: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match=problem) as error:
        read(files.read_json, tmp_path, raw)
    assert str(error.value).startswith(str(tmp_path / "foreign"))
    assert len(str(error.value)) < 1000


def test_a_yaml_mapping_is_read(tmp_path: Path) -> None:
    found = read(files.read_yaml, tmp_path, "a: [1, 2.5, null, ü]\nb: {1: '2'}\nc: |\n  two\n  lines\n")

    assert found == {"a": [1, 2.5, None, "ü"], "b": {1: "2"}, "c": "two\nlines\n"}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 11))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("", "holds a NoneType, not a mapping"),
        ("- 1", "holds a list, not a mapping"),
        ("a: [", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: 1\na: 2\n", "a key appears twice"),
        ("b: {a: 1, a: 2}\n", "a key appears twice"),
        ("a: .nan", "not finite"),
        ("a: [-.inf]", "not finite"),
        ("a: &x 1\nb: *x\n", "uses a YAML alias"),
        (BOMB, "uses a YAML alias"),
        ("a: !!python/object/apply:os.system ['true']", "uses the YAML tag"),
        ("a: !!int x", "uses the YAML tag"),
        ("a: !!bool x", "uses the YAML tag"),
        ("a: !!set {b}", "uses the YAML tag"),
        ("!mine\na: 1", "uses the YAML tag"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: 0b_", "is not valid YAML"),
        ("? [1]\n: 2", "is not valid YAML"),
        ("a: \0", "is not valid YAML"),
        (b"a: \xff", "is not UTF-8"),
        (nested(files.MAX_DEPTH + 1), "nested deeper than 64 levels"),
        ("[" * 200_000, "nested deeper than 64 levels"),
        ("{" * 200_000, "nested deeper than 64 levels"),
        ("- " * 100_000, "nested deeper than 64 levels"),
        ("? " * 100_000, "nested deeper than 64 levels"),
    ],
)
def test_yaml_that_is_not_ours_to_trust_is_refused_in_bounded_time(
    raw: str | bytes, problem: str, tmp_path: Path
) -> None:
    started = time.process_time()
    with pytest.raises(ForeignFileError, match=problem):
        read(files.read_yaml, tmp_path, raw)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("reader", "limit"), [(files.read_json, files.MAX_TEXT_BYTES), (files.read_yaml, files.MAX_YAML_BYTES)]
)
def test_what_is_too_large_is_not_even_read(
    reader: Callable[[Path], dict[str, Any]], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(limit + 1)
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: pytest.fail("it was read"))

    with pytest.raises(ForeignFileError, match=f"has {limit + 1} bytes, more than {limit}"):
        reader(path)


@pytest.mark.parametrize("reader", [files.read_json, files.read_yaml])
def test_what_is_no_file_is_refused(reader: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever

    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(ForeignFileError, match=r"does not exist\. Check the path"):
            reader(path)


plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
trees = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(max_size=4), trees, max_size=3))
def test_any_json_object_is_read_back_as_it_was(value: dict[str, Any], tmp_path: Path) -> None:
    assert read(files.read_json, tmp_path, json.dumps(value)) == value


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text("{}[]:,-?&*!|>'\"% #\n\tab01.e_<~=", max_size=60).map(str.encode))
def test_any_bytes_give_a_mapping_or_our_error(raw: bytes, tmp_path: Path) -> None:
    for reader in (files.read_json, files.read_yaml):
        try:
            found = read(reader, tmp_path, raw)
        except ForeignFileError:
            continue
        assert isinstance(found, dict)
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in found.values())


def test_the_hash_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")

    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_error_survives_the_way_to_another_process(tmp_path: Path) -> None:
    error = ForeignFileError(tmp_path, "is wrong.", "Mend it.")

    copied = pickle.loads(pickle.dumps(error))

    assert str(copied) == str(error) == f"{tmp_path}: is wrong. Mend it."
    assert (copied.path, copied.problem, copied.remedy) == (tmp_path, "is wrong.", "Mend it.")
