"""The table of jobs is the one list of stages: what else tells them apart knows the same ones."""

from __future__ import annotations

from pathlib import Path

from armor.config.measures import EvaluationSettings
from armor.config.recipes import Recipe
from armor.config.run import Config, Run
from armor.evaluate.served import CODE
from armor.report import results
from armor.run.explain import NOTED, TOGETHER
from armor.run.jobs import jobs
from armor.run.stages import STAGES

TRAINING = {"steps": 2, "sequences": 2, "held_out": 1}
EVERY_STAGE = Config.model_validate(
    {
        "models": {"tiny": {"folder": "tiny"}},
        "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
        "recipes": {
            "armor": {"budget": {"bits": 24, "over": [{"block_size": 8}, {"method": "nowag"}]}},
            "refined": {"method": "nowag", "refine": TRAINING, "tune": TRAINING, "quantize": {}},
        },
        "evaluations": {"held_out": {"text": {"files": ["held_out.txt"]}}, "questions": {"tasks": ["piqa"]}},
        "benchmarks": {"decode": {}, "serve": {"engine": "vllm"}},
        "runs": [{"benchmarks": ["decode"]}, {"recipes": ["armor"], "benchmarks": ["serve"]}],
    }
)


def test_explain_knows_what_a_job_notes_of_each_stage_that_it_reads():
    table = list(jobs(EVERY_STAGE))
    assert {job.stage for job in table} == STAGES.keys() - {"experts"}  # these are told by the model
    read = {(name, stage) for job in table if job.stage != "report" for name, stage, _ in job.inputs(EVERY_STAGE)}
    assert {stage for name, stage in read if name not in TOGETHER} == NOTED.keys()


def test_a_model_that_nothing_compresses_is_not_inspected():
    dense = EVERY_STAGE.replace(recipes={"dense": Recipe(method="dense")}, benchmarks={}, runs=[Run()])
    assert {job.stage for job in jobs(dense)} == {"fetch", "predict", "evaluate", "tasks", "report"}


def test_the_report_tells_the_time_of_the_stages_whose_records_it_reads():
    assert list(results.STAGES) == [
        stage for stage, row in STAGES.items() if row.reported and stage not in ("tasks", "serving")
    ]


def test_object_storage_is_told_of_every_output_once():
    """By itself or within a folder, and of no folder twice: Snakemake refuses an output within another."""
    for job in jobs(EVERY_STAGE):
        for output in job.outputs:
            assert len([path for path in job.stored if output.is_relative_to(path)]) == 1, job
        assert not any(a != b and Path(a).is_relative_to(b) for a in job.stored for b in job.stored), job


def test_tasks_behind_a_server_depend_on_what_serves():
    questions = {"questions": EvaluationSettings(tasks=["piqa"], engine="vllm")}
    served = EVERY_STAGE.replace(evaluations=EVERY_STAGE.evaluations | questions)
    also = [STAGES["tasks"].also(config, "tiny", "armor", "questions") for config in (EVERY_STAGE, served)]
    assert also == [[], [*CODE]]
