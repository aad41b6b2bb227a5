"""`benchmarks.paired`: two models on the same items."""

from math import sqrt

import pytest
from datasets import Dataset

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.evaluate.tasks import evaluate_tasks
from armor.format.records.evaluation import TaskRecord
from benchmarks.paired import compare, difference, main
from benchmarks.tasks import drawn, written
from tests.evaluate.test_carried_tasks import PROMPTS, ROWS
from tests.tiny import tiny_model


@pytest.fixture
def evaluated(tmp_path):
    """Evaluate a random model of a seed on some of the items, and return the folder of its answers."""

    def answers(seed, items=9):
        place = tmp_path / f"{items}"
        place.mkdir(exist_ok=True)
        file = written("arc_easy", PROMPTS / "arc/arc_easy.yaml", drawn(Dataset.from_list(ROWS), items), place)
        asked = EvaluationSettings.model_validate({"tasks": [str(file)], "samples": True})
        output = tmp_path / f"{seed}-{items}" / "mine.json"
        evaluate_tasks(tiny_model(tmp_path / f"model{seed}", seed=seed), asked, output)
        return output.with_suffix("")

    return answers


def test_the_error_of_a_difference_leaves_out_what_both_answer_alike():
    apart, error = difference([1, 0, 1, 0], [1, 1, 1, 0])
    assert apart == 0.25
    assert error == pytest.approx(sqrt(3 / 12 / 4))  # the variance of 0, 1, 0, 0, over four
    assert difference([1, 0], [1, 0]) == (0, 0)


def test_values_are_those_of_the_records(evaluated, capsys):
    folders = evaluated(0), evaluated(1)
    ((task, (one, two, metric)),) = compare(*folders).items()
    records = [TaskRecord.read(folder / f"{task}.json") for folder in folders]
    assert (task, metric, len(one)) == ("arc_easy_local", "acc_norm", 9)
    assert [sum(one) / 9, sum(two) / 9] == pytest.approx([record.value for record in records])
    assert one != two
    main(*folders)
    said = capsys.readouterr().out
    assert "arc_easy_local" in said and "±" in said


def test_other_items_are_refused(evaluated):
    first, fewer = evaluated(0), evaluated(0, items=4)
    with pytest.raises(ArmorError, match="other items, or another metric, than"):
        compare(first, fewer)
    (fewer / "arc_easy_local.samples.jsonl").unlink()
    with pytest.raises(ArmorError, match="no such file; evaluate with `samples: true`"):
        compare(first, fewer)
    (fewer / "arc_easy_local.json").unlink()
    with pytest.raises(ArmorError, match=r"no task that .* has too"):
        compare(first, fewer)
