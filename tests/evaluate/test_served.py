"""Tasks behind a server: lm-eval gets from it what it gets from transformers. `make test-vllm` asks the real vLLM, all
else a stand-in.
"""

import json
import os
import sys

import psutil
import pytest

from armor.core.errors import ArmorError
from armor.evaluate.tasks import evaluate_tasks
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


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_server_answers_as_the_model_in_this_process(tmp_path, engine, kind):
    shape = SHAPE | {"max_position_embeddings": CONTEXT}
    folder = tiny_model(tmp_path, **shape) if kind == "dense" else packed(tmp_path, **shape) / "checkpoint"
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
    assert TasksRecord.read(tmp_path / "there" / "reading.json") == there
    assert (here.engine, there.engine) == (None, check_engine()) and there.peak_memory_bytes > 0
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
def test_a_server_that_fails_is_one_line(tmp_path, engine, capfd, defect, said):
    folder = tiny_model(tmp_path / "model")
    (folder / defect).touch()
    asked = settings(sentences(tmp_path), tasks=["last_word"], engine="vllm", dtype="float32")
    with pytest.raises(ArmorError, match=f"{folder}: .*{said}") as error:
        evaluate_tasks(folder, asked, tmp_path / "reading.json")
    assert "\n" not in str(error.value) and not (tmp_path / "reading.json").exists()
    assert ("no answer from here" if defect == "silent" else "Engine core") in capfd.readouterr().err
