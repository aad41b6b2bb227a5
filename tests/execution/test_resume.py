"""Resume: work goes on where it was killed, only if it is the same work, and ends as if nothing had happened."""

from __future__ import annotations

import pytest
import torch

from armor.assemble.writer import assemble
from armor.calibrate.capture import calibrate
from armor.config.layers import LayerSettings
from armor.config.measures import EvaluationSettings
from armor.config.sources import CalibrationSettings, TextSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.evaluate.perplexity import evaluate
from armor.execution.files import part_of, read_json, write_json
from armor.execution.resume import resumable
from armor.factorize.layer import factorize_layer
from armor.factorize.quantize import quantize_layer
from armor.methods.solver.settings import SolverSettings
from tests.killed import HALF, POINTS, SAVED, WRITTEN, forked, killed_everywhere, left_over, passed, results_of
from tests.packed import QUANTIZE, opened, packed
from tests.tiny import tiny_text

STAGE = "armor.core.pattern"
STAGES = ["calibrate", "factorize", "quantize", "assemble", "evaluate"]


class Of(Typed):
    """What the steps here remember."""

    step: str


def steps_of(output, steps=(), **work):
    """The steps that are finished before `steps` are added, of work that then fails."""
    with pytest.raises(KeyboardInterrupt), resumable(output, STAGE, "cpu", **work) as kept:
        names = [file.stem for file in kept.folder.glob("*.json")]
        for name in steps:
            kept.put(name, Of(step=name))
        raise KeyboardInterrupt
    return sorted(names)


def test_steps_are_kept_until_the_work_succeeds(tmp_path):
    output = tmp_path / "a.json"
    assert steps_of(output, ["x.y", "z"], seed=1) == []
    assert steps_of(output, seed=1) == ["x.y", "z"]
    with resumable(output, STAGE, "cpu", seed=1) as steps:
        assert steps.get("x.y", Of) == Of(step="x.y") and steps.get("w", Of) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["work", "code", "threads"])
def test_steps_of_other_work_are_not_taken(tmp_path, other):
    output, threads = tmp_path / "a.json", torch.get_num_threads()
    steps_of(output, ["x"], seed=1)
    (part_of(output) / "x.safetensors").touch()
    (part_of(output) / "checkpoint").mkdir()
    try:
        torch.set_num_threads(threads + (other == "threads"))
        with resumable(
            output, STAGE, "cpu", ["armor.core.packing"] * (other == "code"), seed=1 + (other == "work")
        ) as steps:
            assert len(steps) == 0 and sorted(file.name for file in steps.folder.iterdir()) == ["lock", "work"]
    finally:
        torch.set_num_threads(threads)


def test_the_seconds_of_earlier_runs_count(tmp_path):
    steps_of(tmp_path / "a", ["x", "y"])
    for step, seconds in (("x", 10_000.0), ("y", 20_000.0)):  # as if they had taken so long
        file = part_of(tmp_path / "a") / f"{step}.json"
        write_json(file, read_json(file) | {"seconds": seconds})
    with resumable(tmp_path / "a", STAGE, "cpu") as steps:
        assert steps.seconds() > 20_000
        steps.put("z", Of(step="z"))
        assert 20_000 < read_json(steps.folder / "z.json")["seconds"] <= steps.seconds()


def test_a_step_whose_record_is_damaged_is_done_again(tmp_path):
    steps_of(tmp_path / "a", ["x", "y"])
    (part_of(tmp_path / "a") / "x.json").write_text("{")
    with resumable(tmp_path / "a", STAGE, "cpu") as steps:
        assert steps.get("x", Of) is None and steps.get("y", Of) == Of(step="y")


def test_a_second_process_is_kept_from_the_same_work(tmp_path):
    with resumable(tmp_path / "a", STAGE, "cpu") as steps:
        steps.put("x", Of(step="x"))
        with pytest.raises(ArmorError, match="a: another process is at work on it"):
            with resumable(tmp_path / "a", STAGE, "cpu"):
                pass
        assert len(list(steps.folder.iterdir())) == 3


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Every stage that resumes, as a function of the folder to write to; several steps each."""
    root = packed(tmp_path_factory.mktemp("model"), layers=3)
    (root / "text.txt").write_text(tiny_text())
    text = TextSettings(files=[str(root / "text.txt")])
    source, topology = opened(root)
    calibration = CalibrationSettings(text=text, sequences=6, sequence_length=64, hidden_states_memory_gb=5e-5)
    layer = LayerSettings(method="armor", block_size=16, solver=SolverSettings(iterations=10))
    evaluation = EvaluationSettings(text=text, sequences=12, sequence_length=64)
    return {
        "calibrate": lambda folder: calibrate(source, topology, calibration, folder / "calibration.json"),
        "factorize": lambda folder: factorize_layer(
            source, topology, 1, root / "calibration/layer_1.safetensors", layer, folder / "layer_1.safetensors"
        ),
        "quantize": lambda folder: quantize_layer(
            source,
            topology,
            1,
            root / "layers/layer_1.safetensors",
            root / "calibration/layer_1.safetensors",
            QUANTIZE.for_layer(1),
            folder / "layer_1.safetensors",
        ),
        "assemble": lambda folder: assemble(
            source, topology, root / "layers", folder / "checkpoint.json", max_shard_bytes=40_000
        ),
        "evaluate": lambda folder: evaluate(root / "checkpoint", evaluation, folder / "text.json"),
    }


ONE_EACH = [("calibrate", HALF), ("quantize", WRITTEN), ("assemble", SAVED), ("evaluate", HALF)]
"""All keep their steps by the same code, so the other points of time are those of factorize."""


@pytest.mark.parametrize(("stage", "point"), [*(("factorize", point) for point in POINTS), *ONE_EACH])
def test_killed_anywhere_a_stage_ends_as_if_undisturbed(stages, tmp_path, stage, point):
    assert killed_everywhere(stages[stage], tmp_path, point)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_finished_is_not_done_again(stages, tmp_path, stage):
    def saves(name, number=0):
        assert forked(lambda: stages[stage](tmp_path / name), tmp_path / "counter", SAVED, number) is (number == 0)
        return passed(tmp_path / "counter")

    whole = saves("whole")
    before = saves("again", number=whole * 2 // 3)
    after = saves("again")
    assert before + after <= whole + 1  # of a step whose record was not written yet, its file
    assert results_of(tmp_path / "again") == results_of(tmp_path / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_leaves_nothing_half_written_and_is_gone_on_from(stages, tmp_path, small_disk, stage):
    (tmp_path / "whole").mkdir()
    stages[stage](tmp_path / "whole")
    folder = small_disk("size=96k,nr_inodes=40")
    (folder / "filler").write_bytes(bytes(20_000 if stage != "evaluate" else 80_000))
    with pytest.raises((ArmorError, OSError)) as caught:
        stages[stage](folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "No space left" in str(caught.value) or "needed" in str(caught.value) or "need" in str(caught.value)
    assert not list(folder.rglob("*.tmp")) and not list(folder.glob("*.json"))
    (folder / "filler").unlink()
    small_disk("remount,size=64m,nr_inodes=10000")
    stages[stage](folder)
    assert results_of(folder) == results_of(tmp_path / "whole") and left_over(folder) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(stages, small_disk):
    folder = small_disk("ro")
    with pytest.raises((ArmorError, OSError), match="Read-only") as caught:
        stages["evaluate"](folder)
    assert str(folder) in str(caught.value)
