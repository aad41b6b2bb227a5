"""Records: what a stage writes the next one reads, and anything else is refused in one line that says what to do."""

import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.format.records.base import Record
from armor.format.records.budget import BudgetRecord
from armor.format.records.layer import LayerRecord
from armor.format.reference import record_types

RECORDS = [kind for kind in record_types() if issubclass(kind, Record) and "format_version" in kind.model_fields]
KEPT = Path(__file__).with_name("records")
"""Files that earlier releases wrote. Results of users look like these, so they are never edited."""


def made_up(kind):
    """A value of a field's type: one entry in a collection, the first of a choice, something where null may stand."""
    inside = get_args(kind)
    if kind is Any:
        return [1, None, {"more": 0.5}]
    if get_origin(kind) in (Literal, Union, UnionType):
        return inside[0] if get_origin(kind) is Literal else made_up(inside[0])
    if get_origin(kind) is tuple:
        return tuple(made_up(each) for each in inside if each is not Ellipsis)
    if get_origin(kind) is dict:
        return {'a "key"': made_up(inside[1])}
    if issubclass(kind, Typed):
        return kind(**{name: made_up(field.annotation) for name, field in kind.model_fields.items()})
    return {str: "wörds\n", int: 2**40, float: 0.1, bool: True}[kind]


@pytest.mark.parametrize("kind", RECORDS)
def test_what_was_written_is_read(tmp_path, kind):
    record = made_up(kind)
    record.write(tmp_path / "record.json")
    assert kind.read(tmp_path / "record.json") == record
    kind.read(tmp_path / "record.json").write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "record.json").read_bytes()


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_no_record_of_this_release_is_refused(tmp_path, kind):
    """Another version, none, one that equals the right one; a field too many, one of another type, one too few."""
    own = made_up(kind).as_json()
    first = next(name for name, field in kind.model_fields.items() if field.is_required())
    changes = [{"format_version": version} for version in (own["format_version"] + 1, None, True, "1")]
    broken = [own | change for change in (*changes, {"colour": 1}, {first: [{}]})]
    broken += [{key: value for key, value in own.items() if key != gone} for gone in ("format_version", first)]
    for number, value in enumerate(broken):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(value))
        with pytest.raises(ArmorError) as caught:
            kind.read(file)
        said = str(caught.value)
        assert said.startswith(f"{file}: ") and kind.AGAIN in said and "\n" not in said


def test_a_layers_record_of_an_earlier_release_is_read():
    """Factorizing takes hours. So a field that the record gains has a default, or the version goes up."""
    record = LayerRecord.read(KEPT / "layer.json")
    assert record.modules and record.training[0].restarts == ()


def test_the_bytes_of_a_budget_which_may_be_edited_by_hand(tmp_path):
    BudgetRecord.read(KEPT / "budget.json").write(tmp_path / "budget.json")
    assert (tmp_path / "budget.json").read_bytes() == (KEPT / "budget.json").read_bytes()
