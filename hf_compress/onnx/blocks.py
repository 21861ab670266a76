"""Weights in blocks of few bits with a scale each; activations stay as they are.

Dynamic int8 wrecks gated language models, whose last projection has outliers at its input; blocks do not touch inputs.
A table that is embedding and head at once is stored once: both read the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir

BLOCK = 32
"""Weights that share a scale; 8 bits then take 1.125 bytes a weight."""
_ACCURACY = 4
"""Products in int8, as ONNX Runtime's `accuracy_level` counts."""
_DOMAIN = "com.microsoft"


def quantize_tables(model: onnx_ir.Model, *, tied_only: bool = False) -> None:
    """Puts embedding tables into 8 bits, and the head that shares a table with one; the model is changed in place.

    Args:
        model: with tables (rows, width) whose width is a multiple of `BLOCK`; others stay as they are.
        tied_only: leave tables that are no head as they are.
    """
    for value in list(model.graph.initializers.values()):
        table = value.const_value
        if table is None or len(table.shape) != 2 or table.dtype != onnx_ir.DataType.FLOAT:
            continue
        gathers = [use.node for use in value.uses() if _is_lookup(use)]
        heads = [node for use in value.uses() for node in _heads(use.node)]
        others = len(list(value.uses())) - len(gathers) - len(heads)
        if not gathers or others or (tied_only and not heads) or int(table.shape[1]) % BLOCK:
            continue
        _share(model, value, gathers, heads)


def _is_lookup(use: onnx_ir.Usage) -> bool:
    return bool(use.node.op_type == "Gather" and use.idx == 0 and use.node.attributes.get_int("axis", 0) == 0)


def _heads(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """The product behind a transposed table, as one entry; none if the node is something else."""
    if node.op_type != "Transpose":
        return []
    uses = list(node.outputs[0].uses())
    return [uses[0].node] if len(uses) == 1 and uses[0].node.op_type == "MatMul" and uses[0].idx == 1 else []


def _share(model: onnx_ir.Model, value: onnx_ir.Value, gathers: list[onnx_ir.Node], heads: list[onnx_ir.Node]) -> None:
    assert value.const_value is not None
    graph, table = model.graph, value.const_value.numpy()
    rows, width = table.shape
    packed, scales = _eight_bits(table)
    weights, scale = (
        _initializer(graph, f"{value.name}_Q8", packed),
        _initializer(graph, f"{value.name}_scales", scales),
    )
    flat = _initializer(graph, f"{value.name}_shape", np.array([rows, width], np.int64))
    lines = onnx_ir.node("Reshape", [weights, flat])
    graph.insert_before(graph[0], lines)
    for node in gathers:
        _replace(
            graph,
            node,
            onnx_ir.node(
                "GatherBlockQuantized",
                [lines.outputs[0], node.inputs[1], scale],
                {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 8},
                domain=_DOMAIN,
            ),
        )
    for node in heads:
        transposed = node.inputs[1]
        assert transposed is not None
        sizes = {"K": width, "N": rows, "bits": 8, "block_size": BLOCK, "accuracy_level": _ACCURACY}
        _replace(graph, node, onnx_ir.node("MatMulNBits", [node.inputs[0], weights, scale], sizes, domain=_DOMAIN))
        producer = transposed.producer()
        assert producer is not None
        graph.remove(producer, safe=True)
    del graph.initializers[str(value.name)]
    model.opset_imports[_DOMAIN] = 1


def _eight_bits(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, block, `BLOCK`) uint8 around 128, and (row, block) scales, of (row, width) numbers."""
    library = _library()
    config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=8)
    quantizer = library.DefaultWeightOnlyQuantizer(config)
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(table.T))
    return packed, scales.reshape(len(table), -1)


def _library() -> Any:
    """onnxruntime's quantiser, without what importing it does to the root logger, and without a line for each node."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        root.handlers[:], root.level = handlers, level
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    return matmul_nbits_quantizer


def _initializer(graph: onnx_ir.Graph, name: str, content: np.ndarray) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(content, name=name))
    graph.register_initializer(value)
    return value


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    name, was = old.outputs[0].name, old.outputs[0]
    new.outputs[0].shape, new.outputs[0].type = was.shape, was.type
    for at, output in enumerate(graph.outputs):
        if output is was:
            graph.outputs[at] = new.outputs[0]
    graph.insert_before(old, new)
    was.replace_all_uses_with(new.outputs[0])
    graph.remove(old, safe=True)
    new.outputs[0].name = name


def quantize_products(model: onnx_ir.Model, bits: int, *, gently: bool = False) -> onnx_ir.Model:
    """Every product with a constant matrix in blocks of `bits`.

    Args:
        model: left as it is.
        bits: 4 or 8.
        gently: keep products that narrow their input, such as the last of an MLP, at 8 bits.
    """
    proto = onnx_ir.to_proto(model)
    narrowing = sorted(_narrowing(proto.graph)) if gently else []
    proto = _in_blocks(proto, bits, narrowing)
    if narrowing:
        proto = _in_blocks(proto, 8, [])
    return onnx_ir.from_proto(proto)


def _in_blocks(proto: onnx.ModelProto, bits: int, excluded: list[str]) -> onnx.ModelProto:
    quantizer = _library().MatMulNBitsQuantizer(
        proto, bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=_ACCURACY, nodes_to_exclude=excluded
    )
    quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found


def _narrowing(graph: onnx.GraphProto) -> Iterator[str]:
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        dims = shapes.get(node.input[1]) if node.op_type == "MatMul" else None
        if dims is not None and len(dims) == 2 and dims[0] > dims[1]:
            yield node.name
