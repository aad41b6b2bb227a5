"""Tasks: our numbers are lm-eval's own, the built tasks are always the same, and what cannot be had is one line."""

import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

import armor.hf  # noqa: F401  packed checkpoints load by their path
from armor.assemble.export import export
from armor.config.measures import EvaluationSettings
from armor.config.tasks import asked_tasks
from armor.core.errors import ArmorError
from armor.evaluate.built import build_task, items_of
from armor.evaluate.tasks import CPU_BATCH_SIZE, check_names, evaluate_tasks
from armor.execution.files import read_json
from armor.format.records.evaluation import Metric, TaskRecord, TasksRecord
from armor.runtime.load import weights_bytes
from tests.forks import fork
from tests.killed import left_over
from tests.memory import NoRoom, host_of
from tests.packed import edit_tensors, packed
from tests.tiny import tiny_model

BUILT = ["last_word", "continuation"]


@pytest.fixture(autouse=True)
def without_the_list_of_packages(monkeypatch):
    """lm-eval asks pip for it at every evaluation, for a second."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda *_: ("pip", ""))


def words(seed: int, count: int) -> str:
    known = "river city north stone century castle water king bridge valley market harbour".split()
    return " ".join(random.Random(seed).choices(known, k=count))


def sentences(folder: Path) -> Path:
    """A text in `folder` that tasks are built from."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"The {words(i, 9)}. It was {words(3 * i + 1, 8)}." for i in range(30)))
    return path


@pytest.fixture
def text(tmp_path):
    return sentences(tmp_path)


def settings(text, **changes) -> EvaluationSettings:
    return EvaluationSettings(
        **{"text": {"files": [str(text)]}, "tasks": BUILT, "items": 10, "samples": True} | changes
    )


def likelihoods(folder, task) -> list:
    """Every log-likelihood that was kept of a task, by item and choice."""
    lines = (folder / f"{task}.samples.jsonl").read_text().splitlines()
    answers = [json.loads(line)["filtered_resps"] for line in lines]
    return [[float(one[0] if isinstance(one, list) else one) for one in answer] for answer in answers]


def arc(folder) -> Path:
    """A task like ARC, its YAML file and its questions as JSON lines in `folder`."""
    rows = [
        {
            "question": f"Which {words(k, 3 + k % 6)}?",
            "choices": {"text": [words(50 * k + i, 2 + (k + i) % 4) for i in range(4)], "label": [*"ABCD"]},
            "answerKey": "ABCD"[(k + k // 4) % 4],
        }
        for k in range(24)
    ]
    for split, some in {"train": rows[:8], "test": rows[8:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    task = {
        "task": "own_arc",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    (folder / "own_arc.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder / "own_arc.yaml"


def command_line(folder, file, shots: int, output) -> tuple[dict, list]:
    """The results and every log-likelihood of a task, by lm-eval's own command."""
    command = f"lm_eval run --model hf --model_args pretrained={folder},dtype=float32 --device cpu --tasks {file}"
    command += f" --num_fewshot {shots} --batch_size {CPU_BATCH_SIZE} --output_path {output} --log_samples"

    def work():
        lm_eval.tasks.TaskManager = partial(TaskManager, include_defaults=False)  # reading its own takes seconds
        sys.argv = command.split()
        cli_evaluate()

    done = fork(work, folder)
    assert done.returncode == 0, done.stderr
    (results,), (samples,) = (output.rglob(name) for name in ("results_*.json", "samples_*.jsonl"))
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    found = [[float(response[0]) for response in line["filtered_resps"]] for line in lines]
    return read_json(results)["results"][file.stem], found


def test_a_task_like_arc_has_the_numbers_of_lm_evals_command_line(tmp_path):
    """Dense: the same to the last digit. Packed: log-likelihoods as those of the dense export in float32.

    Those are compared relatively: they are sums of up to some 200 nats, where float32's own numbers lie 1.5e-5 apart.
    """
    root, file = packed(tmp_path), arc(tmp_path)
    export(root / "checkpoint", root / "dense", "float32")
    row, theirs = command_line(root / "dense", file, 2, tmp_path / "theirs")
    asked = EvaluationSettings(tasks=[str(file)], shots=2, samples=True, dtype="float32")
    found, _ = (evaluate_tasks(root / name, asked, tmp_path / f"ours/{name}.json") for name in ("dense", "checkpoint"))
    record = TaskRecord.read(tmp_path / "ours" / "dense" / "own_arc.json")
    assert found.tasks["own_arc"] == record.headline() and (record.items, record.shots) == (16, 2)
    for metric in ("acc", "acc_norm"):
        expected = {"value": row[f"{metric},none"], "standard_error": row[f"{metric}_stderr,none"]}
        assert record.metrics[f"{metric},none"] == Metric(**expected, higher_is_better=True)
        assert 0 < expected["value"] < 1
    assert likelihoods(tmp_path / "ours" / "dense", "own_arc") == theirs
    ours = likelihoods(tmp_path / "ours" / "checkpoint", "own_arc")
    assert [len(item) for item in ours] == [4] * 16
    assert sum(ours, []) == pytest.approx(sum(theirs, []), rel=1e-6, abs=0)


def test_a_finished_task_is_not_run_again(tmp_path, text, caplog):
    folder, output = tiny_model(tmp_path / "model"), tmp_path / "out" / "reading.json"
    caplog.set_level(logging.INFO, "armor")
    first = output.with_suffix("") / "last_word.json"
    with (
        NoRoom(lambda name, _: name == "embedding" and first.exists()),
        pytest.raises(ArmorError, match="continuation"),
    ):
        evaluate_tasks(folder, settings(text), output)
    assert not output.exists()
    again = evaluate_tasks(folder, settings(text), output)
    ran = [line.split()[1] for line in caplog.messages if line.startswith("task ")]
    assert ran == ["last_word", "continuation", "continuation"]
    undisturbed = evaluate_tasks(folder, settings(text), tmp_path / "whole" / "reading.json")
    assert again.tasks == undisturbed.tasks and TasksRecord.read(output) == again
    assert left_over(tmp_path / "out") == []


def test_whether_a_higher_value_is_better_is_what_the_task_says(tmp_path, text):
    task = build_task("continuation", [text.read_text()], 10, tmp_path, "text")
    asked = yaml.safe_load(task.read_text())
    asked["metric_list"] = [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]
    task.write_text(yaml.safe_dump(asked))
    folder = tiny_model(tmp_path / "model")
    result = evaluate_tasks(folder, EvaluationSettings(tasks=[str(task)]), tmp_path / "out" / "own.json")
    found = result.tasks["continuation"]
    assert (found.metric, found.higher_is_better) == ("brier_score", False) and found.value > 0


def test_built_items_are_of_the_text_and_always_the_same(tmp_path, text):
    texts = [text.read_text()]
    for item in items_of("last_word", texts, 30):
        assert f"{item['passage']} {item['word']}." in texts[0].replace("\n", " ")
    items = items_of("continuation", texts, 10)
    for item in items:
        assert len(set(item["choices"])) == 4 and all(len(choice.split()) == 8 for choice in item["choices"])
        assert f"{item['context']} {item['choices'][item['label']]}" in texts[0]
    assert len({item["label"] for item in items}) > 1
    files = [build_task("continuation", texts, 10, tmp_path, "text").with_suffix(".jsonl").read_bytes() for _ in "ab"]
    assert files[0] == files[1] and [json.loads(line) for line in files[0].splitlines()] == items
    with pytest.raises(
        ArmorError, match="here: holds 30 items for last_word, needed 31; give more text, or lower items"
    ):
        build_task("last_word", texts, 31, tmp_path, "here")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["hellaswag", "arc_chalenge"], "task arc_chalenge: lm-eval has none of this name; did you mean arc_challenge"),
        (["ai2_arc"], "task ai2_arc: stands for several .* name them: arc_challenge, arc_easy"),
        (["lest_word"], "did you mean last_word"),  # of our own
        (["none.yaml"], "none.yaml: no such file"),
    ],
)
def test_an_unknown_task_is_named_with_the_nearest(names, said):
    with pytest.raises(ArmorError, match=said):
        check_names(names)


def test_the_papers_tasks_are_there():
    check_names(asked_tasks(EvaluationSettings(tasks=["paper"])))


def test_without_a_network_the_file_that_would_serve_is_named_and_serves(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(ArmorError, match="task arc_easy: cannot be loaded: .*arc_easy_local.yaml") as caught:
        evaluate_tasks(folder, EvaluationSettings(tasks=["arc_easy"]), tmp_path / "out.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()
    keys = re.findall(r"`([^`]+)`", str(caught.value))
    assert [key.partition(":")[0] for key in keys] == "task include dataset_path dataset_name dataset_kwargs".split()
    local = yaml.safe_load("\n".join(keys))
    files = local["dataset_kwargs"]["data_files"]
    assert list(files) == ["train", "validation", "test"]
    for split, file in files.items():
        files[split] = str(tmp_path / file)
        rows = []
        for k in range(6):
            choices = [words(k + i, 3) for i in range(4)]
            answer = {"choices": {"text": choices, "label": [*"ABCD"]}, "answerKey": "ABCD"[k % 4]}
            rows.append({"question": f"Which {words(k, 4)}?", **answer})
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "arc_easy_local.yaml"
    path.write_text(yaml.safe_dump(local))
    result = evaluate_tasks(folder, EvaluationSettings(tasks=[str(path)], shots=1), tmp_path / "out.json")
    found = result.tasks["arc_easy_local"]
    assert (found.metric, found.shots, found.items) == ("acc_norm", 1, 6)


@contextmanager
def room_for(limit: int) -> Iterator[list[int]]:
    """Memory runs out for batches of more than `limit` items; the sizes that were tried.

    Not for the ones on which lm-eval looks for a size: that search may be too hopeful.
    """
    sizes = []

    def too_large(name, tensor):
        if name != "embedding" or tensor.is_floating_point() or bool((tensor == 1).all()):
            return False
        sizes.append(len(tensor))  # tokens
        return len(tensor) > limit

    with NoRoom(too_large):
        yield sizes


def test_batches_too_large_for_the_memory_are_halved(tmp_path, text):
    folder = tiny_model(tmp_path / "model")
    whole = evaluate_tasks(folder, settings(text, items=16), tmp_path / "whole" / "reading.json")
    with room_for(2) as sizes:
        halved = evaluate_tasks(folder, settings(text, items=16), tmp_path / "halved" / "reading.json")
    assert halved.tasks == whole.tasks
    assert list(dict.fromkeys(sizes)) == [8, 4, 2]


def test_a_device_too_small_for_one_item_is_one_line(tmp_path, text):
    folder = tiny_model(tmp_path / "model")
    said = f"{folder}: task last_word: out of memory on cpu with a single item; take"
    with room_for(0), pytest.raises(ArmorError, match=said):
        evaluate_tasks(folder, settings(text), tmp_path / "reading.json")
    assert not (tmp_path / "reading.json").exists()


def streamed_from(caplog) -> list[str]:
    """The folders of the models that were read one decoder layer at a time, as the log has it."""
    return [line.partition(":")[0] for line in caplog.messages if "one decoder layer at a time is read" in line]


def own_task(folder, name: str, **keys) -> str:
    """A task over some sentences, its YAML file in `folder`."""
    (folder / "sentences.jsonl").write_text("".join(json.dumps({"text": words(k, 5 + 9 * k)}) + "\n" for k in range(6)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sentences.jsonl")}}}
    task = {"task": name, **data, "test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}", **keys}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return str(folder / f"{name}.yaml")


GREEDY = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}}


def test_a_model_larger_than_the_memory_answers_and_writes_as_when_it_is_loaded(tmp_path, text, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "armor")
    folder = packed(tmp_path) / "checkpoint"
    keys = {"doc_to_text": "{{text}}", "metric_list": [{"metric": "exact_match"}], **GREEDY}
    writes = own_task(tmp_path, "writes", output_type="generate_until", **keys)
    metrics = [{"metric": "bits_per_byte"}]
    rolling = own_task(tmp_path, "rolling", output_type="loglikelihood_rolling", metric_list=metrics)
    asked = settings(text, tasks=["last_word", str(arc(tmp_path)), rolling, writes])
    loaded = evaluate_tasks(folder, asked, tmp_path / "loaded" / "reading.json")
    assert streamed_from(caplog) == []
    host_of(monkeypatch, weights_bytes(folder) - 1)
    streamed = evaluate_tasks(folder, asked, tmp_path / "streamed" / "reading.json")
    assert streamed_from(caplog) == [str(folder)]
    for task, count in {"last_word": 10, "own_arc": 64, "rolling": 6}.items():
        there, here = (likelihoods(tmp_path / name / "reading", task) for name in ("loaded", "streamed"))
        assert sum(map(len, here)) == count
        assert sum(here, []) == pytest.approx(sum(there, []), rel=1e-6)
        assert streamed.tasks[task].value == pytest.approx(loaded.tasks[task].value, rel=1e-6)
    there, here = ((tmp_path / name / "reading/writes.samples.jsonl").read_text() for name in ("loaded", "streamed"))
    assert here == there and len(set(json.loads(line)["resps"][0][0] for line in here.splitlines())) > 1


def test_nan_likelihoods_are_refused(tmp_path, text):
    folder = tiny_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ArmorError, match=f"{folder}: last_word: the log-likelihoods are not finite .item 0."):
        evaluate_tasks(folder, settings(text), tmp_path / "reading.json")
    assert not (tmp_path / "reading.json").exists()
