"""The reference pages are what the types and the registry say, and say it of every field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from armor.config import reference
from armor.core.errors import ArmorError
from armor.format.layout import Results
from armor.format.reference import record_reference, record_table, record_types, words
from armor.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "config/README.md", "docs/RECORDS.md")
NOT_OF_A_RECORD = ("root", "log", "measured", "report")


@pytest.mark.parametrize("page", PAGES)
def test_the_generated_parts_of_a_page_are_fresh(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert "<!-- generated: " in text
    assert reference.fresh(text, page) == text, "run: make reference"


def test_every_part_is_in_some_page():
    texts = [(REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES]
    missing = [part for part in reference.PARTS if not any(f"generated: {part} -->" in text for text in texts)]
    assert missing == []


def test_making_parts_anew_keeps_all_else_and_refuses_what_makes_none():
    text = "before\n\n<!-- generated: armor schema --methods -->\nold\n<!-- end -->\n\nafter\n"
    once = reference.fresh(text)
    assert once.startswith("before\n\n<!--") and once.endswith("<!-- end -->\n\nafter\n") and "old" not in once
    assert reference.fresh(once) == once
    with pytest.raises(ArmorError, match=r"page\.md: generated: 'armor nothing': expected one of armor schema"):
        reference.fresh("<!-- generated: armor nothing -->\n<!-- end -->", "page.md")


@pytest.mark.parametrize("kind", [*record_types(), *reference.SECTIONS.values()], ids=lambda kind: kind.__name__)
def test_every_type_and_field_says_what_it_is(kind):
    assert kind.__doc__
    silent = [name for name, field in kind.model_fields.items() if not field.description]
    assert [name for name in silent if name != "format_version"] == [], "write a text below the field"


def test_a_record_lies_where_the_layout_has_it_and_the_site_has_its_fields():
    results = Results("")
    known = {getattr(results, name)() for name in vars(Results) if name[0] != "_" and name not in NOT_OF_A_RECORD}
    rows = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| \S.* \| \S.* \|$", record_table(), re.MULTILINE)
    kinds = {kind.__name__ for kind in record_types() if "format_version" in kind.model_fields}
    assert {kind for _, kind in rows} == kinds
    assert {path.rpartition("/")[2] for path, _ in rows if f"/{path}" not in known} == {
        "provenance.json",
        "{task}.json",
        "summary.json",
    }
    full = record_reference()
    assert [kind for _, kind in rows if f"## {kind}\n" not in full] == []


def test_every_key_of_a_configuration_and_every_method_is_in_the_reference():
    text = reference.markdown()
    for kind in reference.SECTIONS.values():
        assert [key for key in kind.model_fields if f"| `{key}` |" not in text] == []
    assert [m.title for m in METHODS.values() if f"| `{m.name}` | {m.title} |" not in text] == []


@pytest.mark.parametrize("heading", reference.SECTIONS)
def test_a_type_leads_to_the_section_that_has_its_keys_and_no_others(heading):
    sections = {text.partition("\n")[0]: text for text in f"\n{reference.markdown()}".split("\n## ")}
    keys = {
        f"#{name.lower().replace(' ', '-')}": {*re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
        for name, text in sections.items()
    }
    schema = reference.SECTIONS[heading].model_json_schema()
    own = schema["$defs"][schema["$ref"].removeprefix("#/$defs/")] if "$ref" in schema else schema
    for key, value in own["properties"].items():
        (row,) = re.findall(rf"^\| `{key}` \|.*", sections[heading], re.MULTILINE)
        types = re.findall(r"#/\$defs/(\w+)", str(value))
        assert [keys[link] for link in re.findall(r"\((#[\w-]+)\)", row)] == [
            schema["$defs"][name]["properties"].keys() for name in types
        ], row


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "text"),
        ({"type": "integer", "minimum": 0}, "integer ≥ 0"),
        ({"type": "number", "exclusiveMinimum": 0}, "number > 0"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"type": "array", "items": {"type": "integer"}}, "list of integer"),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}]}, "list [integer, number]"),
        ({"enum": ["a", "b"], "type": "string"}, "`a`, `b`"),
        ({"type": "object", "additionalProperties": {"$ref": "#/$defs/File"}}, "mapping to [File](#file)"),
        ({"type": "object", "patternProperties": {"x": {"type": "string"}}}, "mapping of name to text"),
        ({}, "any value"),
    ],
)
def test_types_in_plain_words(schema, expected):
    assert words(schema) == expected
