"""tests/freeze.py finds in this tree what it probes, so that it still runs when a restructuring needs it."""

import freeze
import pytest
from cases import CASES

CASE = next(iter(CASES.values()))


@pytest.mark.slow
def test_freeze_finds_presets_cases_and_files():
    wanted = freeze.list_wanted(freeze.TREE, list(freeze.PARTS), "")
    assert wanted["cases"] == CASES
    assert wanted["presets"] and wanted["files"]
    assert freeze.list_wanted(freeze.TREE, ["presets"], "^tiny$") == {"presets": ["tiny"], "cases": {}, "files": []}


def test_freeze_computes_a_case():
    found = freeze.probe_case(CASE)
    assert set(found) == {"loss", "gradients", "logits", "cached"}
    assert found == freeze.probe_case(CASE)


def test_freeze_names_what_differs():
    before = {"a": {"loss": 1.5, "logits": "x"}, "b": {"loss": 2.5}}
    assert freeze.compare(before, before) == []
    assert freeze.compare(before, {"a": {"loss": 1.5, "logits": "y"}}) == [
        "a: logits was x and is y",
        "b: loss was 2.5 and is None",
    ]
