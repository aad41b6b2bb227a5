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
    assert one.fingerprint != read_blocks(folder, texts[0], 3, 16).fingerprint


def test_without_a_number_all_of_the_text_is_read(tmp_path):
    (tmp_path / "text.txt").write_text("a text of a few words. " * 20)
    folder, text = tiny_model(tmp_path / "model"), TextSettings(files=[str(tmp_path / "text.txt")])
    number = len(read_blocks(folder, text, None, 16))
    assert number > 2
    with pytest.raises(ArmorError, match=f"needed {number + 1} x 16"):
        read_blocks(folder, text, number + 1, 16)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArmorError, match=f"^{tmp_path}: no config.json here"):
        block_length(tmp_path, 16)


@pytest.mark.parametrize("says", [-1, 0])
def test_a_context_without_an_end_takes_any_length_and_asks_for_one(tmp_path, says):
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": says}))
    assert block_length(folder, 5000) == 5000
    with pytest.raises(ArmorError, match=r"config\.json: names no context length; set sequence_length"):
        block_length(folder, None)
