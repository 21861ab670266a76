"""Run as a process of its own: loads one model, runs one batch, and tells the most memory that it had.

    echo '{"kind": "onnx", "source": "student/onnx", "batch": 32, "length": 64, "threads": 1, "device": "cpu"}' |
        python -m hf_compress_evaluation.serving_process

An exported variant is opened with ONNX Runtime and numpy alone, as it is served; a torch model with transformers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def resident() -> int | None:
    """Bytes, the most that this process had in memory; None where the system does not tell.

    From Linux's VmHWM, which begins anew with each program: `ru_maxrss` begins with that of the process that started
    this one.
    """
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def run_torch(source: str, batch: int, length: int, threads: int, device: str) -> int | None:
    """Bytes that torch allocated on the GPU at most; None on a CPU."""
    import torch
    import transformers

    from hf_compress import foreign

    torch.set_num_threads(threads)
    with foreign.loading(source, "to serve", "Save the model again."):
        config = foreign.config(source)
        architecture = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, architecture, transformers.AutoModel)
        model = kind.from_pretrained(source, config=config, **foreign.SAFE)
    model = model.eval().to(device)
    ids = torch.ones(batch, length, dtype=torch.long, device=device)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def run_onnx(source: str, batch: int, length: int, threads: int, device: str) -> int | None:
    """One batch through the graph of a folder; None: what ONNX Runtime allocates on a GPU it does not tell."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if device == "cpu":  # as `load_onnx` opens it
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    session = onnxruntime.InferenceSession(str(Path(source) / "model.onnx"), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"the graph runs on {session.get_providers()[0]}, not on {provider}")
    types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
    kinds = {"token_type_ids": np.zeros}  # some models know one alone
    session.run(
        None,
        {spec.name: kinds.get(spec.name, np.ones)((batch, length), types[spec.type]) for spec in session.get_inputs()},
    )
    return None


def main() -> None:
    """Reads what to run from standard input and writes {"resident": bytes, "allocated": bytes}, null where unknown."""
    wanted: dict[str, Any] = json.load(sys.stdin)
    kind = wanted.pop("kind")
    allocated = run_torch(**wanted) if kind == "torch" else run_onnx(**wanted)
    print(json.dumps({"resident": resident(), "allocated": allocated}))


if __name__ == "__main__":
    main()
