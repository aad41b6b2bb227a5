"""The table of families: what a family comes to is what happens to it, and the page has all that was found."""

from __future__ import annotations

import pytest

from benchmarks.families import CLOSE, attempt

ODD = ["deepseek_v4", "idefics3+images", "longcat_flash"]


@pytest.mark.parametrize("family", ODD)
def test_what_becomes_of_a_family(tmp_path, family):
    (tmp_path / family).mkdir()
    found = attempt(family, tmp_path / family)
    assert found["outcome"] == "ok" and 0 < found["packed_against_dense"] <= CLOSE
    assert 0.9 < found["compressed_share"] < 1


@pytest.mark.parametrize(
    "family, outcome, said", [("hrm_text", "refused", "no list"), ("blt", "no model", "parameters")]
)
def test_what_stops_a_family_is_told(tmp_path, family, outcome, said):
    found = attempt(family, tmp_path)
    assert found["outcome"] == outcome and said in found["note"] and str(tmp_path) not in found["note"]
