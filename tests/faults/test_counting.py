"""The tally itself."""

from __future__ import annotations

from types import SimpleNamespace

from counting import tally


def test_what_a_failed_test_had_tried_is_lost() -> None:
    def report(passed: bool, *notes: str, when: str = "call") -> SimpleNamespace:
        properties = [("fault", ("killed runs", note)) for note in notes]
        return SimpleNamespace(when=when, passed=passed, user_properties=properties)

    reports = [report(True, "in a save", ""), report(False, "in a save"), report(True, "", when="teardown")]
    assert tally(reports) == {"killed runs": {"tried": 3, "survived": 2, "lost": 1, "in a save": 2}}
