"""How near an exported graph is to its matrix products alone, which no software can leave out.

Each product of a forward pass, by its shape, is timed as a graph of that one product, in the same runtime with the same
threads; the sum is what the graph would take if all else cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress.onnx import export_onnx
from hf_compress.onnx.runtime import open_session
from hf_compress_evaluation.demo.recipe import packaged

from . import Bench, Figures
from ._machine import Machine
from .onnx import REPEATS, alternately, inputs_of

Product = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of the two factors."""
GRAPH, PRODUCTS = "graph", "products"


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is partly typed
    """Counts the matrix products of what runs inside, by their shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            factors = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.found[tuple(factors[0].shape), tuple(factors[1].shape)] += 1
        return func(*args, **(kwargs or {}))


def products(model: Any, batch: int, length: int) -> Counter[Product]:
    """How often a forward pass multiplies matrices of which shapes."""
    watched = Watched()
    with torch.no_grad(), watched:
        model(**{name: torch.tensor(value) for name, value in inputs_of(batch, length).items()})
    return watched.found


def operations(counted: Mapping[Product, int]) -> int:
    """Multiplications and additions of all of them."""
    return sum(2 * times * int(np.prod(first)) * second[-1] for (first, second), times in counted.items())


def prepare(folder: Path) -> None:
    """A classifier on MiniLM, exported."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(packaged(), num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged()).save_pretrained(folder)
    export_onnx(folder)


def run(part: str, on: Machine, folder: Path) -> Figures:
    """Milliseconds of a call, or of its matrix products one after the other, for each shape of the inputs."""
    found: dict[str, float] = {}
    if part == GRAPH:
        session = open_session(folder / "onnx" / "model.onnx", provider=on.device, threads=on.threads)
        for (batch, length), repeats in REPEATS.items():
            call = _call(session, inputs_of(batch, length))
            found[f"{batch} x {length}, ms"] = 1000 * alternately({part: call}, repeats)[part]
        return found
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    for (batch, length), repeats in REPEATS.items():
        counted = products(model, batch, length)
        calls = {str(product): _product(*product, on=on) for product in counted}
        seconds = alternately(calls, repeats)
        total = sum(times * seconds[str(product)] for product, times in counted.items())
        found[f"{batch} x {length}, ms"] = 1000 * total
        found[f"{batch} x {length}, GFLOP/s"] = operations(counted) / total / 1e9
    return found


def _call(session: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(None, inputs)


def _product(first: tuple[int, ...], second: tuple[int, ...], *, on: Machine) -> Callable[[], Any]:
    """A call of a graph of one product; the second factor of two matrices is a weight, as in a layer."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    left, right = (draw.standard_normal(shape, dtype=np.float32) for shape in (first, second))
    given = {"left": left} if len(second) == 2 else {"left": left, "right": right}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, one.shape) for name, one in given.items()]
    output = helper.make_tensor_value_info("product", TensorProto.FLOAT, (*first[:-1], second[-1]))
    weights = [] if "right" in given else [numpy_helper.from_array(right, "right")]
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    model = helper.make_model(helper.make_graph([node], "product", inputs, [output], weights))
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = on.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return _call(session, given)


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of a call to its products."""
    shapes = [f"{batch} x {length}" for batch, length in REPEATS]
    return {f"call / products, {one}": figures[GRAPH][f"{one}, ms"] / figures[PRODUCTS][f"{one}, ms"] for one in shapes}


BENCH = Bench(
    setting="MiniLM-L6 with a classifier's head, our float32 graph; every matrix product of a forward pass timed by "
    "its shape as a graph of that product alone, summed; batch x tokens, ONNX Runtime on a CPU.",
    parts=(GRAPH, PRODUCTS),
    prepare=prepare,
    run=run,
    threads=1,
    ratios=ratios,
    bars={},
)
