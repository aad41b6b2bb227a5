"""Two small tasks built from a text, always the same, for runs without a network.

`last_word`, after LAMBADA (Paperno et al. 2016): two sentences that follow each other, the last word of which the model
must find. `continuation`, after HellaSwag (Zellers et al. 2019): a sentence, and four beginnings of the next one. One
is the text's own. Three follow other sentences, those of the next items, mostly of the same article. Plain rules keep
the items short, about 30 tokens, so that a hundred of them take seconds on a CPU. Nobody filtered them by hand:
accuracies compare models on this text, and with nothing published. Each task is a JSON-lines file and the lm-eval task
that reads it, so that `lm_eval --tasks FILE.yaml` runs it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import yaml

from armor.core.errors import ArmorError
from armor.execution.files import atomic_path

__all__ = ["build_task", "items_of"]

SENTENCE_END = re.compile(r"(?<=[a-z)][.!?]) +(?=[A-Z])")
LAST_WORD = re.compile(r"(.+) ([a-z]{4,})\.")
CHOICES = 4
BEGINNING = 8  # words of a continuation: all choices are equally long
TASKS = {
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{passage}}",
        "doc_to_target": " {{word}}",
    },
    "continuation": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
    },
}


def build_task(name: str, texts: Iterable[str], count: int, folder: Path, where: str) -> Path:
    """Write the task `name`, `count` items from `texts`, to `folder`: `{name}.jsonl` and, returned, `{name}.yaml`.

    Raises ArmorError, naming `where`, if the text has fewer.
    """
    items = items_of(name, texts, count)
    if len(items) < count:
        raise ArmorError(
            f"{where}: holds {len(items)} items for {name}, needed {count}; give more text, or lower items"
        )
    data = folder / f"{name}.jsonl"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
        "test_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **TASKS[name],
    }
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    for file, text in ((data, lines), (data.with_suffix(".yaml"), yaml.safe_dump(task, sort_keys=False))):
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return data.with_suffix(".yaml")


def items_of(name: str, texts: Iterable[str], count: int) -> list[dict]:
    """The first `count` items of the task `name` in `texts`, fewer if there are no more; reads no further."""
    if name == "last_word":
        return list(islice(_last_words(texts), count))
    pairs = list(islice(_continuations(texts), count))
    items = []
    for index, (context, own) in enumerate(pairs):
        choices = sorted(pairs[(index + step) % len(pairs)][1] for step in range(CHOICES))
        items.append({"context": context, "choices": choices, "label": choices.index(own)})
    return items


def _pairs(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Sentences that follow each other within a paragraph; no sentence twice."""
    for text in texts:
        for paragraph in text.splitlines():
            sentences = SENTENCE_END.split(paragraph.strip())
            yield from zip(sentences[::2], sentences[1::2], strict=False)


def _last_words(texts: Iterable[str]) -> Iterator[dict]:
    for first, second in _pairs(texts):
        passage = f"{first} {second}"
        if (found := LAST_WORD.fullmatch(passage)) and 16 <= len(passage.split()) <= 28:
            yield {"passage": found[1], "word": found[2]}


def _continuations(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for first, second in _pairs(texts):
        words = second.split()
        beginning = " ".join(words[:BEGINNING])
        if 8 <= len(first.split()) <= 14 and len(words) > BEGINNING and beginning not in seen:
            seen.add(beginning)
            yield first, beginning
