"""A saved model in a process where this package cannot be imported: its folder must be enough."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SERVER = """
import json
import os
import sys
import traceback
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
transformers.AutoModel, transformers.PreTrainedModel, transformers.GenerationMixin
print(flush=True)
for line in sys.stdin:
    code, errors = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        try:
            exec(code, {"torch": torch, "transformers": transformers})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Has imported what every model needs, and forks for each: importing takes seconds."""


@cache
def server() -> subprocess.Popen[str]:
    """One for all tests of a process; it ends with its input, when that process does."""
    started = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "\n", "the process without this package did not start"
    return started


def output_of(folder: Path, auto: str, call: str) -> Tensor:
    """What `call`, an expression of `model`, gives for the model that the Auto class loads from the folder.

    Args:
        folder: as `save_pretrained` wrote it.
        auto: name of the Auto class.
        call: gives a tensor.
    """
    target, errors = (folder.parent / f"{folder.name}-alone.{ending}" for ending in ("pt", "txt"))
    code = f"model = transformers.{auto}.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
    code += f"torch.save(({call}).detach(), {str(target)!r})"
    asked = server()
    assert asked.stdin is not None
    assert asked.stdout is not None
    asked.stdin.write(json.dumps([code, str(errors)]) + "\n")
    asked.stdin.flush()
    assert asked.stdout.readline() == "0\n", errors.read_text()[-2000:]
    found: Tensor = torch.load(target, weights_only=True)
    return found
