"""An exported ONNX graph as a file: private, with named axes, whole.

The exporter writes the stack trace of each node into the graph (absolute paths and lines of the user's source) and
leaves the axes anonymous. Both are mended here, on `onnx_ir` models, before a file is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from hf_compress import files
from hf_compress.errors import ConfigurationError, ForeignFileError

WEIGHTS = "_data"
"""Added to a graph's name: the one name of external weights that Optimum fetches from a hub."""
PLACEHOLDER = ".data"
"""Added to a graph's name: an empty file that transformers' `ExportedModel.from_pretrained` insists on."""
INLINE_BYTES = 1_500_000_000
"""Weights up to this size stay inside `model.onnx`; protobuf ends at 2 GiB, graph included."""
SHARED_BYTES = 2**12
"""Least size of a weight that graphs of one variant share in a file."""
MAX_NODES = 100_000
"""Most nodes of a foreign graph. ONNX Runtime takes ten seconds to open twice as many, in five megabytes."""

_PRIVATE = re.compile(r'stack_trace|site-packages|File "|(?<![\w./:])/[\w.+-]+/[\w.+-]|(?<!\w)[A-Za-z]:\\\w')
_NO_TEXT = ("raw_data", "dim_param")
"""Fields whose content is no text of a person: numbers, and formulas of axes."""


def strip_metadata(model: onnx_ir.Model) -> None:
    """Removes every `metadata_props` and doc string: of the model, graphs, functions, nodes, values and weights."""
    for holder in _holders(model):
        holder.metadata_props.clear()
        if getattr(holder, "doc_string", None):
            holder.doc_string = None


def _holders(model: onnx_ir.Model) -> Iterator[Any]:
    yield model
    yield from model.functions.values()
    for graph in (*model.graphs(), *model.functions.values()):
        yield graph
        yield from graph.inputs
        for value in getattr(graph, "initializers", {}).values():
            yield value
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            yield node
            yield from node.outputs


def name_axes(model: onnx_ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Gives the symbolic axes their names in inputs, outputs and everything between.

    Args:
        model: changed in place.
        axes: input name -> {dimension: name}, the dimensions that must vary.

    Raises:
        ConfigurationError: for an input or an output whose axis was frozen to a number while tracing.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, name in axes.get(value.name, {}).items():
            symbol = _symbol(value, dimension)
            if symbol.isidentifier():  # else a formula of symbols that other inputs name
                names[symbol] = name
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for graph in model.graphs():
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            _rename(value, names, pattern)
    first = next(iter(names.values()))
    for value in model.graph.outputs:
        sizes = [str(getattr(size, "value", size)) for size in value.shape or ()]
        if (sizes or value.shape is None) and not any(re.search(rf"\b{first}\b", size) for size in sizes):
            raise _frozen(value, 0)


def _symbol(value: onnx_ir.Value, dimension: int) -> str:
    size = value.shape[dimension] if value.shape is not None and len(value.shape) > dimension else None
    symbol = getattr(size, "value", None)
    if not isinstance(symbol, str):
        raise _frozen(value, dimension)
    return symbol


def _frozen(value: onnx_ir.Value, dimension: int) -> ConfigurationError:
    return ConfigurationError(
        f"{value.name}: axis {dimension} should vary and came out of the export as a number in {value.shape}; the "
        "graph would take this one size only. The model's forward turns that size into a constant: find where it "
        "reads a shape into Python (int(), a branch, an assertion) and keep it a tensor operation."
    )


def _rename(value: onnx_ir.Value, names: Mapping[str, str], pattern: re.Pattern[str]) -> None:
    if value.shape is None:
        return
    dimensions = [getattr(size, "value", size) for size in value.shape]  # a symbol may be a formula of two: 2*s41
    value.shape = onnx_ir.Shape(
        pattern.sub(lambda found: names[found[1]], size) if isinstance(size, str) else size for size in dimensions
    )


FLAG = "use_cache_branch"
"""Input of a merged decoder, as Optimum and browser runtimes feed it: False in the first call."""
PAST, PRESENT = "past_key_values.", "present."
"""How the names of keys and values begin, as inputs and as outputs."""


def reuse_cross(model: onnx_ir.Model, *, batch: str, source: str) -> None:
    """Lets a traced first call of a decoder serve every call: what depends on the encoder alone is computed once.

    The graph gets the inputs `use_cache_branch` and `past_key_values.N.encoder.*`. Keys and values of the encoder's
    states are computed where the flag is False and handed through where it is True; the decoder's own past counts
    only where it is True. All weights stay outside of the branches, once.

    Args:
        model: changed in place; its outputs `present.N.encoder.*` are computed from the encoder's states.
        batch: name of the first axis of the new inputs.
        source: name of their third.
    """
    graph = model.graph
    flag = onnx_ir.Value(name=FLAG, shape=onnx_ir.Shape([1]), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL))
    graph.inputs.append(flag)
    _empty_unless(flag, graph)
    crossed = [value for value in graph.outputs if value.name and ".encoder." in value.name]
    given = [_past_of(value, batch, source) for value in crossed]
    _in_order_of_outputs(graph, given)
    moved = _only_for(crossed)
    made = [onnx_ir.Value(name=value.name, shape=value.shape, type=value.type) for value in crossed]
    first = next(node for node in graph if node in moved)
    uses = [(value, list(value.uses())) for value in crossed]
    kept = [onnx_ir.node("Identity", [value], outputs=[_like(value, f"{value.name}.kept")]) for value in given]
    reused = [node.outputs[0] for node in kept]
    branch = onnx_ir.Node(
        "",
        "If",
        [flag],
        outputs=made,
        attributes=[
            onnx_ir.AttrGraph("then_branch", onnx_ir.Graph([], reused, nodes=kept, name="reused")),
        ],
    )
    graph.insert_before(first, branch)
    inside = [node for node in graph if node in moved]
    for (value, places), outer in zip(uses, made, strict=True):
        for use in places:
            if use.node not in moved:
                use.node.replace_input_with(use.idx, outer)
        graph.outputs[list(graph.outputs).index(value)] = outer
        value.name = f"{value.name}.computed"
    graph.remove(inside)
    branch.attributes.add(onnx_ir.AttrGraph("else_branch", onnx_ir.Graph([], crossed, nodes=inside, name="computed")))
    graph.sort()


def _in_order_of_outputs(graph: onnx_ir.Graph, added: Sequence[onnx_ir.Value]) -> None:
    """Puts the past after the other inputs, in the order in which it comes out: Optimum pairs them by place."""
    past = {value.name: value for value in (*graph.inputs, *added) if value.name and value.name.startswith(PAST)}
    others = [value for value in graph.inputs if value.name not in past]
    order = [value.name.replace(PRESENT, PAST) for value in graph.outputs if value.name]
    graph.inputs.clear()
    graph.inputs.extend([*others, *(past[name] for name in order if name in past)])


def keeps_cache(path: Path) -> bool:
    """Whether a graph takes keys and values of what came before."""
    check_external(path)
    return any(value.name.startswith(PAST) for value in _read(path).graph.input)


def _empty_unless(flag: onnx_ir.Value, graph: onnx_ir.Graph) -> None:
    """Cuts the decoder's own past to no positions where the flag is False: some runtimes feed one of zeros."""
    past = [value for value in graph.inputs if value.name and value.name.startswith(PAST)]
    nodes, most = [], np.iinfo(np.int64).max

    def constant(name: str, *numbers: int) -> onnx_ir.Value:
        value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array(numbers, np.int64), name=name))
        graph.register_initializer(value)
        return value

    zero, all_of_it, axis = constant("past.zero", 0), constant("past.all", most), constant("past.axis", 2)
    nodes.append(onnx_ir.node("Where", [flag, all_of_it, zero]))
    for value in past:
        cut = onnx_ir.node(
            "Slice", [value, zero, nodes[0].outputs[0], axis], outputs=[_like(value, f"{value.name}.cut")]
        )
        value.replace_all_uses_with(cut.outputs[0])
        cut.replace_input_with(0, value)
        nodes.append(cut)
    graph.insert_before(graph[0], nodes)


def _like(value: onnx_ir.Value, name: str) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=value.shape, type=value.type)


def _past_of(value: onnx_ir.Value, batch: str, source: str) -> onnx_ir.Value:
    assert value.name is not None
    assert value.shape is not None
    _, heads, _, width = value.shape
    name = value.name.replace(PRESENT, PAST)
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape([batch, heads, source, width]), type=value.type)


def _only_for(values: Sequence[onnx_ir.Value]) -> set[onnx_ir.Node]:
    """The nodes that serve nothing but the computation of `values`."""
    found = {node for value in values if (node := value.producer()) is not None}
    waiting = [*found]
    while waiting:
        for value in waiting.pop().inputs:
            node = None if value is None else value.producer()
            if node is None or node in found:
                continue
            uses = [use.node for output in node.outputs for use in output.uses()]
            if all(use in found for use in uses) and not any(output.is_graph_output() for output in node.outputs):
                found.add(node)
                waiting.append(node)
    return found


def save_all(models: Mapping[str, onnx_ir.Model], folder: Path) -> None:
    """Writes the graphs of a variant by file name; a large weight that several of them hold is written once.

    Such weights lie in the external data of the last graph: T5 embeds with one table in its encoder and its decoder.

    Raises:
        ConfigurationError: as `save`.
    """
    if len(models) > 1:
        _share_weights(list(models.values()), folder / f"{[*models][-1]}{WEIGHTS}")
    for name, model in models.items():
        save(model, folder / name)


def _share_weights(models: Sequence[onnx_ir.Model], path: Path) -> None:
    held: dict[tuple[str, bytes], list[onnx_ir.Value]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            if (tensor := value.const_value) is not None and tensor.nbytes >= SHARED_BYTES:
                digest = hashlib.sha256(tensor.tobytes()).digest()
                held.setdefault((f"{tensor.dtype} {tensor.shape}", digest), []).append(value)
    shared = [values for values in held.values() if len({id(value.graph) for value in values}) > 1]
    if not shared or _bytes(models[-1]) > INLINE_BYTES:
        return
    with open(path, "wb") as file:
        for values in shared:
            tensor = values[0].const_value
            assert tensor is not None
            offset = file.tell()
            file.write(tensor.tobytes())
            for value in values:
                value.const_value = onnx_ir.ExternalTensor(
                    path.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=str(value.name),
                    base_dir=str(path.parent),
                )  # fmt: skip


def _bytes(model: onnx_ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(tensor.nbytes for tensor in tensors)


def load(path: Path) -> onnx_ir.Model:
    """A saved graph with all its weights in memory."""
    model = onnx_ir.load(str(path))
    onnx_ir.external_data.load_to_model(model)
    return model


def save(model: onnx_ir.Model, path: Path) -> None:
    """Writes a graph with the weights inside, or with them in `<name>.onnx_data` above `INLINE_BYTES`.

    The empty `<name>.onnx.data` is written in both cases, see `PLACEHOLDER`.

    Raises:
        ConfigurationError: if the file names a folder or holds source lines of the exporting machine.
    """
    large = _bytes(model) > INLINE_BYTES
    onnx_ir.save(model, str(path), external_data=path.name + WEIGHTS if large else None)
    path.with_name(path.name + PLACEHOLDER).touch()
    check_private(path)


def files_of(folder: Path) -> tuple[Path, ...]:
    """The graphs of a variant, sorted."""
    return tuple(sorted(folder.glob("*.onnx")))


def check_private(path: Path) -> None:
    """Refuses a graph file with metadata, an absolute path or a source line in it; numbers of weights are not text.

    Raises:
        ConfigurationError: with the kind of what was found, never more of it than 40 bytes.
    """
    for message in _messages(onnx.load(str(path), load_external_data=False)):
        if "metadata_props" in message.DESCRIPTOR.fields_by_name and message.metadata_props:
            raise ConfigurationError(
                f"{path.name}: {message.DESCRIPTOR.name} carries metadata {message.metadata_props[0].key!r}; such "
                "entries hold paths and source lines of this machine. Strip the model before saving it."
            )
        for text in _texts(message):
            if found := _PRIVATE.search(text):
                raise ConfigurationError(
                    f"{path.name}: a {message.DESCRIPTOR.name} names a place on this machine ({found.group()[:40]!r}). "
                    "Rename the module or buffer that carries it before exporting."
                )


def texts(path: Path) -> Iterator[bytes]:
    """Every string of a graph file, numbers of weights left out.

    Raises:
        ForeignFileError: if the file is no graph.
    """
    for message in _messages(_read(path)):
        for text in _texts(message):
            yield text.encode()


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has a private module; nothing but parsing happens here
        raise ForeignFileError(path, f"is not a readable ONNX graph ({error}).", "Export or fetch it again.") from error


def check_external(path: Path) -> None:
    """Refuses a graph of unknown origin that is not ONNX, or whose weights lie outside its folder.

    Raises:
        ForeignFileError: naming the graph, or the file that it points to.
    """
    nodes = 0
    for message in _messages(_read(path)):
        nodes += isinstance(message, onnx.NodeProto)
        if nodes > MAX_NODES:
            raise ForeignFileError(path, f"has more than {MAX_NODES} nodes.", "Check where it comes from.")
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            for entry in message.external_data:
                if entry.key == "location":
                    _check_data(path.parent, entry.value)


def _check_data(folder: Path, name: str | bytes) -> None:
    """Refuses a file of weights that lies elsewhere, also under a second name: ONNX Runtime takes a hard link."""
    if isinstance(name, bytes):  # protobuf leaves a text as it is that is no UTF-8
        raise ForeignFileError(folder, f"names a file of weights as {name!r}.", "Export or fetch it again.")
    path = files.inside(folder, name)
    if not path.is_file():
        raise ForeignFileError(folder / name, "is missing.", "Export or fetch it again.")
    if path.stat().st_nlink > 1:
        raise ForeignFileError(folder / name, "is a hard link: its bytes may be another's.", "Copy the file.")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it: subgraphs, functions and attributes included."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in (value,) if hasattr(value, "ListFields") else value:
                yield from _messages(child)


def _texts(message: Any) -> Iterator[str]:
    """The strings of one message. Searched one by one: in the file their length precedes them, as any character."""
    for field, value in message.ListFields():
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES) and field.name not in _NO_TEXT:
            for text in (value,) if isinstance(value, str | bytes) else value:
                yield text if isinstance(text, str) else text.decode("latin-1")
