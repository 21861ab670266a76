"""The parsers of ours under atheris, which looks for bytes that reach new code.

    pip install atheris
    PYTHONPATH=tests python tests/fuzz/fuzz_parsers.py read_recipe -max_total_time=60 corpus/
    PYTHONPATH=tests python tests/fuzz/fuzz_parsers.py all -max_total_time=600

The first argument is a name of `fuzzing.TARGETS`, or `all`: then the first byte chooses. What follows is libFuzzer's.
A finding is any exception that is not ours, a file that takes more than ten seconds (`-timeout=10`), or more than 2 GB.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["hf_compress", "hf_compress_cards", "hf_compress_evaluation", "yaml", "json"]):
    from fuzzing import TARGETS, run


def main() -> None:
    """Fuzzes the target that the command names, from its own valid files."""
    name, *arguments = sys.argv[1:]
    names = sorted(TARGETS) if name == "all" else [name]
    logging.disable()
    corpus = Path(tempfile.mkdtemp())
    for place, each in enumerate(names):
        for number, seed in enumerate(TARGETS[each][2]):
            (corpus / f"{each}-{number}").write_bytes((bytes([place]) if name == "all" else b"") + seed)

    def one(raw: bytes) -> None:
        if name != "all":
            run(name, raw)
        elif raw:
            run(names[raw[0] % len(names)], raw[1:])

    limits = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=8192"]
    own = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    atheris.Setup([sys.argv[0], *limits, *flags, *own, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
