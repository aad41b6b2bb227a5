"""Text: the tokens of the tokenizer on the whole text, cut into blocks, from every kind of source."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.text.blocks import token_blocks
from armor.text.sources import documents
from armor.text.wikipedia import clean_article
from tests.tiny import tiny_text, tiny_tokenizer
from tests.wheels import use_wheels, wheel

PARAGRAPH = "The old town stands by the river, and its walls were built of stone from the hills near the coast. " * 12


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path / "tokenizer")


def write(path: Path, content: str | bytes) -> TextSettings:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return TextSettings(files=[str(path)])


def test_a_file_gives_the_tokens_of_its_whole_text(tmp_path, tokenizer):
    text = " \n = Title = \r\n\n" + tiny_text(20) + "\n\n\n"
    settings = write(tmp_path / "a.txt", text)
    expected = tokenizer(text).input_ids
    blocks = token_blocks(settings, tokenizer, None, 64)
    assert blocks.dtype == torch.int64 and blocks.shape == (len(expected) // 64, 64)
    assert blocks.flatten().tolist() == expected[: blocks.numel()]
    assert torch.equal(token_blocks(settings, tokenizer, 3, 64), blocks[:3])


def test_documents_are_joined_by_a_blank_line_and_read_only_as_far_as_needed(tmp_path, tokenizer):
    """One token a byte: the first guess is far too much, and yet the line beyond it, which is broken, is never read."""
    lines = [f"Document number {i}: " + tiny_text(1 + i % 3) for i in range(400)]
    written = [json.dumps({"text": line}) for line in lines]
    expected = tokenizer("\n\n".join(lines)).input_ids
    blocks = token_blocks(write(tmp_path / "a.jsonl", "\n".join(written[:50] + ["broken"])), tokenizer, 4, 200)
    assert blocks.flatten().tolist() == expected[:800]
    blocks = token_blocks(write(tmp_path / "b.jsonl", "\n".join(written)), tokenizer, 40, 200)
    assert blocks.flatten().tolist() == expected[:8000]


def test_where_tokens_are_long_more_is_read_until_it_is_enough(tmp_path):
    words = [f"{i:05}".translate(str.maketrans("0123456789", "abcdefghij")) * 8 for i in range(300)]  # of 40 letters
    fast = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    fast.pre_tokenizer = Whitespace()
    settings = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": word}) for word in words))
    blocks = token_blocks(settings, PreTrainedTokenizerFast(tokenizer_object=fast), 25, 10)
    assert blocks.flatten().tolist() == list(range(250))


def test_a_text_too_short_says_what_was_found_and_needed(tmp_path, tokenizer):
    settings = write(tmp_path / "a.txt", "x" * 100)
    message = r"a\.txt: found 100 tokens in 1 documents, needed 3 x 40 = 120; "
    with pytest.raises(ArmorError, match=message):
        token_blocks(settings, tokenizer, 3, 40)


def test_the_texts_of_a_mixture_take_turns(tmp_path, tokenizer):
    texts = [write(tmp_path / f"{name}.txt", name * (100 - 20 * turn)) for turn, name in enumerate("abc")]
    mixture = TextSettings(mixture=texts)

    def read(count):
        return tokenizer.batch_decode(token_blocks(mixture, tokenizer, count, 20))

    assert read(5) == [letter * 20 for letter in "abcab"]
    assert read(2) == ["a" * 20, "b" * 20]  # what has no turn is not read
    assert read(None) == [letter * 20 for letter in "abc" * 3]
    with pytest.raises(ArmorError, match=r"c\.txt: found 60 tokens in 1 documents, needed 4 x 20 = 80; "):
        read(12)


def test_rows_of_wikitext_are_joined_and_lose_its_spaces_where_asked(tmp_path, tokenizer):
    rows = ["It is , in the 1 @.@ 5", '@-@ mile range , the town \'s " first " .\n']
    settings = write(tmp_path / "rows.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    settings = settings.model_copy(update={"separator": " ", "detokenize": "wikitext"})
    blocks = token_blocks(settings, tokenizer, None, 1)
    assert tokenizer.decode(blocks.flatten()) == 'It is, in the 1.5-mile range, the town\'s "first" .\n'


def page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    moved = f'<redirect title="{title}" />' if redirect else ""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f"<page><title>{title}</title><ns>{namespace}</ns>{moved}<revision><text>{text}</text></revision></page>"


def export(*pages: str) -> str:
    names = '<siteinfo><namespaces><namespace key="0" /><namespace key="6">Bild</namespace></namespaces></siteinfo>'
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{names}{"".join(pages)}</mediawiki>'


@pytest.mark.parametrize("suffix, pack", [(".xml", bytes), (".xml.bz2", bz2.compress)])
def test_articles_of_a_mediawiki_export(tmp_path, suffix, pack):
    pages = [
        page("A", "'''Alpha''' [[Bild:x.jpg|thumb|a picture]]" + PARAGRAPH),
        page("Moved", "#REDIRECT [[A]]" + PARAGRAPH, redirect=True),
        page("Talk:A", PARAGRAPH, namespace=1),
        page("Stub", "Short."),
        page("B", "Beta " + PARAGRAPH),
        page("C", "Gamma " + PARAGRAPH),
    ]
    path = tmp_path / f"wiki{suffix}"
    path.write_bytes(pack(export(*pages).encode()))
    settings = TextSettings(files=[str(path)])
    texts = list(documents(settings))
    assert [text.split()[0] for text in texts] == ["Alpha", "Beta", "Gamma"]
    assert texts[0] == ("Alpha " + PARAGRAPH).strip()
    first, rest = (list(documents(settings.model_copy(update={"documents": d}))) for d in ((0, 3), (3, None)))
    assert first == texts[:2] and rest == texts[2:]  # articles are counted before stubs are dropped


@pytest.mark.parametrize(
    "markup, text",
    [
        ("''Italic'' and '''bold''' [[link|shown]] [[plain]].", "Italic and bold shown plain."),
        ("A fact.<ref name=x>{{cite web|url=http://x.org}} Smith.</ref> Next.<ref name=x/>", "A fact. Next."),
        ("{{Infobox|name=[[x]]|text={{y|z}}}}Text [http://x.org site] &amp; more.", "Text site & more."),
        ("Text.[[File:a.png|thumb|A [[nested]] caption]] [[Category:Towns]]End.", "Text. End."),
        ("Text.\n\n== History ==\nOld.\n\n== See also ==\n* [[Other]]\n== References ==\nx", "Text.\n\nHistory\nOld."),
        ("[[2001: A Space Odyssey]] <!-- hidden --><math>x^2</math> is.", "2001: A Space Odyssey is."),
    ],
)
def test_markup_becomes_prose(markup, text):
    assert clean_article(markup) == text


def test_a_package_carries_a_text(tmp_path, monkeypatch):
    packed = bz2.compress(export(page("A", PARAGRAPH)).encode())
    wheel(use_wheels(monkeypatch, tmp_path), "sometext", {"sometext/wiki.xml-part.bz2": packed})
    settings = TextSettings(package="sometext==1.0", file="sometext/wiki.xml-part.bz2")
    assert list(documents(settings)) == [PARAGRAPH.strip()]


def test_a_dataset_gives_its_column(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"body": f"text {i}", "n": i}) + "\n" for i in range(9)))
    settings = TextSettings(dataset=str(folder), column="body", documents=(2, 5))
    assert list(documents(settings)) == ["text 2", "text 3", "text 4"]
    with pytest.raises(ArmorError, match="has no column text; it has body, n"):
        list(documents(settings.model_copy(update={"column": "text"})))
    with pytest.raises(ArmorError, match="dataset .*none train: cannot be read") as caught:
        list(documents(settings.model_copy(update={"dataset": str(tmp_path / "none")})))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.txt.bz2", bz2.compress(b"text" * 100)[:-9], "cannot be read"),
        ("a.xml", export(page("A", PARAGRAPH)).encode()[:-20], "not a whole MediaWiki export"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 is no JSON object with a text 'text'"),
    ],
    ids=["latin1.txt", "cut.bz2", "cut.xml", "second-line.jsonl"],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(ArmorError, match=message) as caught:
        list(documents(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
