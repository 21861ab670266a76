"""Drafts of a target, made and measured: resumable, and shown as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hf_compress_evaluation import draft

from hf_compress import files
from hf_compress.errors import ForeignFileError


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    """Stopped when the last draft is to be measured; the second run loads it and trains nothing."""
    output, real, asked = tmp_path / "draft.json", draft.measure, list[Any]()

    def stopped(*given: Any, **settings: Any) -> Any:
        asked.append(given)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(*given, **settings)

    with mock.patch.object(draft, "measure", stopped), pytest.raises(KeyboardInterrupt):
        draft.run(tmp_path, output, tiny=True, bar=False)
    assert [row["draft"] for row in files.read_json(output)["rows"]] == [draft.CUT, draft.PLAIN]

    with mock.patch.object(draft, "train_into", side_effect=AssertionError("trained again")):
        found = draft.run(tmp_path, output, tiny=True, bar=False)

    assert [row["draft"] for row in found["rows"]] == [draft.CUT, draft.PLAIN, draft.DISTILLED]
    assert json.loads(json.dumps(found)) == files.read_json(output)
    weights = [row["sampled"]["on_continuations"]["value"] for row in found["rows"]]
    assert len(set(weights)) == 3
    for row in found["rows"]:
        for how in draft.DECODINGS:
            counts = row[how]["counts"]
            beyond = counts["target_calls"] + counts["accepted"] - counts["tokens"]
            assert 0 <= beyond <= draft.TINY.prompts  # one less for each text that a drafted token ended
    header, rule, *lines = draft.markdown(found).splitlines()
    assert header.count("|") == rule.count("|") == lines[0].count("|")
    assert "`python -m hf_compress_evaluation.draft --tiny`" in lines[-1]

    files.write_text(output, output.read_text().replace('"steps": 4', '"steps": 5'))
    with pytest.raises(ForeignFileError, match="rows of other settings"):
        draft.run(tmp_path, output, tiny=True, bar=False)
