"""Files of strangers: model folders with one fault each, and a child process whose time and memory are bounded.

A fault is a function that takes a valid folder and spoils it. Where code could be smuggled in, it would run `CANARY`,
which writes the file that the environment names: the child reports whether that was written.
"""

from __future__ import annotations

import base64
import gc
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SUNG = "HOSTILE_CANARY"
"""The variable that names the file which foreign code would write."""
CANARY = f"__import__('pathlib').Path(__import__('os').environ[{SUNG!r}]).touch()"
"""The code that must not run."""
MEMORY = 3 << 30
"""Bytes of address space beyond what the child begins with. The threads of a session alone reserve a part of it."""
SECONDS = 20
"""Of processor and of wall time; what is refused is refused in a few tenths of a second."""


# ---------------------------------------------------------------------- the child


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a function ended in a child process."""

    kinds: tuple[str, ...] = ()
    """Classes of the error, from its own to its bases; none: it returned."""
    message: str = ""
    value: Any = None
    seconds: float = 0.0
    sung: bool = False
    """Whether foreign code has run."""
    died: str = ""
    """Why the child gave no answer."""
    out: str = field(default="", repr=False)
    """What it printed."""

    @property
    def is_ours(self) -> bool:
        """Whether it raised an error of hf_compress."""
        return "hf_compress.errors.HfCompressError" in self.kinds


def _child(function: Callable[[], Any], connection: Any, log: Path, seconds: float, memory: int) -> None:
    with log.open("w") as file:  # pytest's own capture stays in the parent
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()  # it would touch, and so copy, what the parent holds
    start = time.perf_counter()
    try:
        value = function()
        found: dict[str, Any] = {"value": value}
    except BaseException as error:  # a panic and an exit are answers too
        kinds = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
        found = {"kinds": kinds, "message": str(error)}
    found["seconds"] = time.perf_counter() - start
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(found)
    connection.close()
    os._exit(0)  # threads of libraries are not waited for


def run_limited(
    function: Callable[[], Any], folder: Path, *, seconds: float = SECONDS, memory: int = MEMORY
) -> Outcome:
    """Calls a function in a fork of this process under limits on address space, processor time and wall time.

    Args:
        function: returns what can be pickled.
        folder: for the canary and for what the child prints.
        seconds: of processor time and of wall time.
        memory: bytes of address space beyond those that the fork begins with.
    """
    canary, log = folder / "canary", folder / "child.log"
    canary.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SUNG, str(canary))
        child = context.Process(target=_child, args=(function, sender, log, seconds, memory))
        child.start()
    sender.close()
    died, found = "", {}
    try:
        if receiver.poll(seconds):
            found = receiver.recv()
        else:
            died = f"gave no answer in {seconds} s"
    except EOFError:
        child.join(5)
        died = f"exit code {child.exitcode}"
    child.kill()
    child.join()
    return Outcome(**found, sung=canary.exists(), died=died, out=log.read_text(errors="replace"))


@pytest.fixture
def limited_child(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`limited_child(function)`: see `run_limited`; nothing of it lies in the test's own folder."""
    return lambda function, **limits: run_limited(function, tmp_path_factory.mktemp("child"), **limits)


# ---------------------------------------------------------------------- the corpus

Spoil = Callable[[Path], None]
FAULTS: dict[str, Spoil] = {}
"""By name, whose first word is its kind: what spoils a model folder."""
HARMLESS = {
    "config_of_code_of_its_own_for_a_known_type": "the class of transformers is taken, the code left alone",
    "config_of_quantisation": "a method that transformers does not know is left out",
    "tokenizer_of_ids_at_the_limit": "a text without that token has none of its ids",
    "tokenizer_without_its_unknown": "each letter is a token, so that none is unknown",
    "tokenizer_that_pads_to_a_trillion": "padding is the caller's to ask for",
    "tokenizer_of_a_pattern_that_backtracks": "its library ends the search after some steps",
    "tokenizer_of_an_added_token_far_out": "a text without that token has none of its ids",
    "tokenizer_of_code_of_its_own": "the class of transformers is taken, the code left alone",
    "tokenizer_of_a_class_that_is_a_path": "the general class is taken",
    "tokenizer_of_added_tokens_far_out": "a text without that token has none of its ids",
    "tokenizer_of_a_file_elsewhere": "the folder's own file is taken",
}
"""Faults that need no error, and why."""


def spoils(function: Spoil) -> Spoil:
    """Adds a function to the corpus."""
    FAULTS[function.__name__] = function
    return function


class Payload:
    """Unpickled, it runs the canary."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (CANARY,)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes behind it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: str | bytes, data: bytes, *, length: int | None = None) -> None:
    """A safetensors file of a header, true or not."""
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def change(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewritten(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    edited = edit(header)
    write_header(path, edited if isinstance(edited, str) else json.dumps(header), data)


@spoils
def weights_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@spoils
def weights_of_three_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x05\x00\x00")


@spoils
def weights_padded(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 1000)


@spoils
def weights_with_a_key_twice(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> str:
        name = next(name for name in header if name.endswith("classifier.weight"))
        first = json.dumps({name: header[name]})
        return first[:-1] + ", " + json.dumps(header)[1:]

    _rewritten(folder, edit)


@spoils
def weights_with_a_header_of_exabytes(folder: Path) -> None:
    write_header(folder / "model.safetensors", "{}", b"", length=2**62)


@spoils
def weights_with_a_header_of_90_megabytes(folder: Path) -> None:
    write_header(folder / "model.safetensors", b"{" + b" " * 90_000_000 + b"}", b"")


@spoils
def weights_with_a_deep_header(folder: Path) -> None:
    write_header(folder / "model.safetensors", '{"a": ' + "[" * 500_000 + "]" * 500_000 + "}", b"")


@spoils
def weights_that_overlap(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    _rewritten(folder, edit)


@spoils
def weights_beyond_the_end(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        name = [name for name in header if name != "__metadata__"][-1]
        header[name] |= {"data_offsets": [0, 2**60], "shape": [2**30, 2**28]}

    _rewritten(folder, edit)


@spoils
def weights_whose_shape_overflows(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        name = next(name for name in header if name.endswith("classifier.weight"))
        header[name]["shape"] = [2**33, 2**33]

    _rewritten(folder, edit)


@spoils
def weights_of_an_unknown_type(folder: Path) -> None:
    _rewritten(folder, lambda header: json.dumps(header).replace('"F32"', '"OBJECT"'))


@spoils
def weights_of_other_shapes(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        name = next(name for name in header if name.endswith("classifier.weight"))
        header[name]["shape"] = header[name]["shape"][::-1]

    _rewritten(folder, edit)


@spoils
def weights_that_are_html(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!doctype html><html>404</html>")


@spoils
def weights_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


@spoils
def weights_pickled_under_a_safe_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))


def _index(folder: Path, place: Callable[[Path], str]) -> None:
    """Weights outside the folder, named by an index."""
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    header, _ = header_of(outside)
    names = {name: place(outside) for name in header if name != "__metadata__"}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@spoils
def index_that_climbs(folder: Path) -> None:
    _index(folder, lambda outside: f"../{outside.name}")


@spoils
def index_of_an_absolute_path(folder: Path) -> None:
    _index(folder, str)


@spoils
def index_of_a_link(folder: Path) -> None:
    def place(outside: Path) -> str:
        if not (folder / "part.safetensors").is_symlink():
            (folder / "part.safetensors").symlink_to(outside)
        return "part.safetensors"

    _index(folder, place)


@spoils
def index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2]}')


@spoils
def index_of_numbers(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": 1}}')


@spoils
def adapter_of_another_model(folder: Path) -> None:
    config = {"base_model_name_or_path": "../elsewhere", "peft_type": "LORA", "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


def _config(name: str, **changes: Any) -> None:
    def spoil(folder: Path) -> None:
        change(folder / "config.json", **changes)

    FAULTS[name] = spoil


_config("config_of_ten_million_layers", num_hidden_layers=10_000_000)
_config("config_of_a_hundred_thousand_layers", num_hidden_layers=100_000)
_config("config_of_a_trillion_layers", num_hidden_layers=10**12)
_config("config_of_layers_as_text", num_hidden_layers="many")
_config("config_without_layers", num_hidden_layers=None)
_config("config_of_minus_one_layer", num_hidden_layers=-1)
_config("config_of_a_trillion_tokens", vocab_size=10**12)
_config("config_of_a_huge_width", hidden_size=2**40)
_config("config_of_a_width_beyond_64_bits", hidden_size=2**70)
_config("config_of_a_trillion_positions", max_position_embeddings=10**12)
_config("config_of_a_billion_labels", id2label=None, label2id=None, num_labels=10**9)
_config("config_of_no_heads", num_attention_heads=0)
_config("config_of_a_type_that_is_a_list", model_type=["bert"])
_config("config_of_an_unknown_type", model_type="../../etc/passwd")
_config("config_of_numbers_as_labels", id2label=[1, 2, 3])
_config("config_of_an_unknown_activation", hidden_act="os.system")
_config("config_of_an_unknown_dtype", dtype="__import__")
_config(
    "config_of_code_of_its_own", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
)
_config("config_of_a_kernel_of_its_own", _attn_implementation="evil/kernel", attn_implementation="evil/kernel")
_config("config_of_quantisation", quantization_config={"quant_method": "evil"})
_config("config_of_a_function_as_architecture", architectures=["pipeline"])
_config("config_of_another_class_as_architecture", architectures=["TrainingArguments"])
_config("config_of_a_dunder_as_architecture", architectures=["__loader__"])
_config("config_of_numbers_as_architecture", architectures=[5])
_config("config_of_weights_elsewhere", transformers_weights="../../outside.safetensors")


@spoils
def config_of_code_of_its_own_for_a_known_type(folder: Path) -> None:
    """Harmless: the class of transformers is taken, and the code is left alone."""
    change(
        folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.M"}
    )


@spoils
def config_with_a_key_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"num_hidden_layers": 3, ' + text[1:])


@spoils
def config_nested_deeply(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)


@spoils
def config_of_17_megabytes(folder: Path) -> None:
    change(folder / "config.json", name="x" * (17 << 20))


@spoils
def config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@spoils
def config_truncated(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


@spoils
def config_in_another_encoding(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(path.read_text().encode("utf-16"))


@spoils
def config_of_many_digits(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"a": ' + "9" * 100_000 + ", " + text[1:])


@spoils
def config_that_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


# tokenizers


@spoils
def tokenizer_truncated(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


def _tokenizer(name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        edit(value)
        (folder / "tokenizer.json").write_text(json.dumps(value))
        change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # takes it as it is

    FAULTS[name] = spoil


def _charsmap(trie: bytes, text: bytes = b"text") -> dict[str, str]:
    """A normalizer of a compiled table, whose bytes the library takes as they come."""
    raw = struct.pack("<I", len(trie)) + trie + text
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


_tokenizer("tokenizer_of_ids_at_the_limit", lambda value: value["model"]["vocab"].update({"[UNK]": 2**32 - 1}))
_tokenizer("tokenizer_of_ids_beyond_the_limit", lambda value: value["model"]["vocab"].update({"the": 2**40}))
_tokenizer("tokenizer_without_its_unknown", lambda value: value["model"]["vocab"].pop("[UNK]"))
_tokenizer("tokenizer_of_another_type", lambda value: value.update(model={"type": "Unigram", "vocab": [], "unk_id": 7}))
_tokenizer("tokenizer_of_an_id_beyond_the_model", lambda value: value["model"]["vocab"].update({"the": 5000}))
_tokenizer("tokenizer_that_panics", lambda value: value.update(normalizer=_charsmap(b"\0" * 8, b"\xff")))
_tokenizer("tokenizer_that_panics_over_a_text", lambda value: value.update(normalizer=_charsmap(b"\0" * 8)))
_tokenizer(
    "tokenizer_of_an_unknown_token_without_a_name",
    lambda value: value.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}),
)
_tokenizer(
    "tokenizer_of_a_stride_beyond_its_length",
    lambda value: value.update(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 2**60}
    ),
)
_tokenizer(
    "tokenizer_that_pads_to_a_trillion",
    lambda value: value.update(
        padding={
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        }
    ),
)
_tokenizer(
    "tokenizer_of_a_bad_pattern",
    lambda value: value.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    ),
)
_tokenizer(
    "tokenizer_of_a_pattern_that_backtracks",
    lambda value: value.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a|a|ab|b|[a-z ]+)*$X"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
)
_tokenizer(
    "tokenizer_of_an_added_token_far_out",
    lambda value: value["added_tokens"].append(
        {
            "id": 2**32 - 1,
            "content": "<far>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ),
)


@spoils
def tokenizer_nested_deeply(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)


def _tokenizer_config(name: str, **changes: Any) -> None:
    def spoil(folder: Path) -> None:
        change(folder / "tokenizer_config.json", **changes)

    FAULTS[name] = spoil


_tokenizer_config(
    "tokenizer_of_code_of_its_own", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
)
_tokenizer_config("tokenizer_of_a_class_that_is_a_path", tokenizer_class="../../evil")
_tokenizer_config("tokenizer_of_a_length_as_text", model_max_length="long")
_tokenizer_config(
    "tokenizer_of_added_tokens_far_out", added_tokens_decoder={str(10**15): {"content": "<far>", "special": True}}
)
_tokenizer_config("tokenizer_of_added_tokens_as_text", added_tokens_decoder={"x": "y"})
_tokenizer_config("tokenizer_of_a_file_elsewhere", vocab_file="/etc/passwd", tokenizer_file="/etc/passwd")
