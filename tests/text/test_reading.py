"""Blocks of tokens that fit the context of a model."""

from __future__ import annotations

import json

import pytest

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.text.reading import block_length, read_blocks
from tests.tiny import tiny_model


def test_a_fingerprint_is_of_the_tokens_alone(tmp_path):
    folder, texts = tiny_model(tmp_path / "model"), []
    for name in ("one", "other"):
        (tmp_path / name).write_text("a text of a few words. " * 20)
        texts.append(TextSettings(files=[str(tmp_path / name)]))
    one, other = (read_blocks(folder, text, 2, 16) for text in texts)
    assert one.tokens.shape == (len(one), one.length) == (2, 16) and one.fingerprint == other.fingerprint
    whole = read_blocks(folder, texts[0], None, 16)
    assert len(whole) > 2 and whole.fingerprint != one.fingerprint
    assert read_blocks(folder, texts[0], None, None).length == 128  # of the model


def test_a_context_without_an_end_takes_any_length_and_asks_for_one(tmp_path):
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": -1}))
    assert block_length(folder, 5000) == 5000
    with pytest.raises(ArmorError, match=r"config\.json: names no context length; set sequence_length"):
        block_length(folder, None)
