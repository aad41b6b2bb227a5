"""`benchmarks.answers`: a document is a question and the answer to it, and what is left out is in none."""

import json

import pytest

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.evaluate.tasks import evaluate_tasks
from benchmarks.answers import documents, main
from tests.evaluate.test_tasks import GREEDY, own_task, words
from tests.tiny import tiny_model


def test_a_document_is_a_question_and_what_the_model_answers(tmp_path):
    keys = {"doc_to_text": "{{text}}?", "metric_list": [{"metric": "exact_match"}], **GREEDY}
    task = own_task(tmp_path, "writes", output_type="generate_until", **keys)
    evaluate_tasks(tiny_model(tmp_path / "model"), EvaluationSettings(tasks=[task], samples=True), tmp_path / "e.json")
    file, output = tmp_path / "e/writes.samples.jsonl", tmp_path / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    main(file, output, [f"text={words(1, 14)}"])
    found = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    kept = [row for row in rows if row["doc"]["text"] != words(1, 14)]
    assert len(kept) == 5 and sorted(found) == sorted(row["doc"]["text"] + "?" + row["resps"][0][0] for row in kept)
    assert documents(rows + rows, []) == documents(rows, [])  # a task with two filters has each row twice
    with pytest.raises(ArmorError, match="--leave-out subject: rows have no such field; they have text"):
        documents(rows, ["subject=snarks"])
