"""A saved model in a process where this package cannot be imported: its folder must be enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

BLOCKED = """
import sys
for name in ("hf_compress", "hf_compress_plugins"):
    sys.modules[name] = None
try:
    import hf_compress
except ImportError:
    pass
else:
    raise AssertionError("hf_compress can be imported")
import torch
import transformers
"""


def output_of(folder: Path, auto: str, call: str) -> Tensor:
    """What `call`, an expression of `model`, gives for the model that the Auto class loads from the folder.

    Args:
        folder: as `save_pretrained` wrote it.
        auto: name of the Auto class.
        call: gives a tensor.
    """
    target = folder.parent / f"{folder.name}-alone.pt"
    code = f"{BLOCKED}\nmodel = transformers.{auto}.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
    code += f"torch.save(({call}).detach(), {str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: Tensor = torch.load(target, weights_only=True)
    return found
