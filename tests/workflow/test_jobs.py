"""All stages on a mixture of experts: they end, go on after a kill, and their hashes cover what they execute."""

from __future__ import annotations

import runpy
import sys

import pytest
import snakemake.cli

from armor.config.run import Config
from armor.execution import fingerprint
from armor.run.explain import Reruns
from armor.run.stages import STAGES
from armor.run.status import read_status
from tests.engine import stand_in
from tests.tiny import tiny_model
from tests.workflow.conftest import REPOSITORY, Run

WRAPPER = """
import atexit, inspect, os, sys
seen = set()
def note(frame, event, arg):  # of calls alone: it returns no function for the lines
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # of a function, not the body of a module or a class
        if frame.f_code.co_name == "_root":  # the command begins; before it only modules were imported
            seen.clear()
        seen.add(frame.f_code.co_filename)
def tell():
    sys.settrace(None)
    root = os.environ["ARMOR_ROOT"]
    own = [name for name in seen if name.startswith(root + "/armor/") and name.endswith(".py")]
    names = sorted(os.path.relpath(name, root) for name in own)
    with open(os.path.join(os.environ["ARMOR_SEEN"], f"{os.getpid()}.txt"), "w") as file:
        file.write("\\n".join([" ".join(sys.argv[1:]), *names]))
def begin():
    atexit.register(tell)
    sys.settrace(note)
name = os.path.basename(sys.argv[0]) if sys.argv else ""
if name == "armor":
    begin()
elif name == "sitecustomize.py":  # run by the test, in what becomes Snakemake and forks the server of jobs
    os.register_at_fork(after_in_child=begin)
"""
AROUND = (
    *("armor/__main__.py", "armor/__init__.py", "armor/command/", "armor/run/"),
    "armor/model/source.py",  # the command opens the source; its fingerprint is an input of the job
    "armor/execution/fingerprint.py",  # the hash of the code for the record
    *(
        "armor/methods/__init__.py",
        "armor/methods/solver/memory.py",
    ),  # methods register themselves when they are imported
)
"""What a command executes around its stage: arguments, settings from JSON, what made the result."""
SAID = {
    "inspect": {
        *("armor/model/cost.py", "armor/core/pattern.py", "armor/core/blocksizes.py", "armor/format/checkpoint.py"),
        *("armor/core/factorization.py", "armor/core/integers.py"),
    },
}
"""What a command executes after its stage, for what it prints."""
ITEM = "The {0} rivers ran past the old stone city. It took {0} kings to build the bridge of the northern market.\n"
"""What makes an item of both tasks that are built from a text."""


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, config, patch):
    """A run of the whole workflow, all stages, on a mixture of 4 experts in groups of 2; its commands told on.

    Every stage runs once, for what a command executes is not seen in its imports: methods and tasks are found by name.
    """
    folder = tmp_path_factory.mktemp("executed")
    (folder / "python").mkdir()
    (folder / "seen").mkdir()
    header = f"import os\nos.environ['ARMOR_ROOT'] = {str(REPOSITORY)!r}\n"
    header += f"os.environ['ARMOR_SEEN'] = {str(folder / 'seen')!r}\n"
    (folder / "python/sitecustomize.py").write_text(header + WRAPPER)
    (folder / "run").mkdir()
    model = tiny_model(folder / "tiny", "qwen3_moe", layers=1, moe_intermediate_size=32)
    training = {"steps": 2, "batch": 2, "sequences": 3, "held_out": 1, "warm_up": 1}
    bits = {"bits": 30, "over": [{"block_size": 8}, {"method": "dense"}], "sequences": 1}
    trained = {"refine": dict(training), "tune": dict(training), "quantize": {}}
    tuned = config["recipes"]["armor"] | {"budget": bits, "experts_per_job": 2} | trained
    questions = folder / "questions.txt"
    questions.write_text("".join(map(ITEM.format, ("two", "three", "four", "five"))))
    tasks = {"text": {"files": [str(questions)]}, "tasks": ["last_word", "continuation"], "items": 4}
    short = config | {"models": {"tiny": {"folder": str(model)}}, "recipes": {"tuned": tuned}}
    short["evaluations"] = config["evaluations"] | {"questions": tasks}
    decode = {"prompt_tokens": 4, "new_tokens": 4, "repeats": 2, "batch_sizes": [1], "prompts": []}
    short["benchmarks"] = {"decode": decode, "serve": {"engine": "vllm", "clients": [1], "repeats": 1}}
    short["recipes"]["dense"] = {"method": "dense"}
    served = {"recipes": ["dense"], "evaluations": [], "benchmarks": ["serve"]}
    short["runs"] = [{"recipes": ["tuned"], "benchmarks": ["decode"]}, served]
    patch.setenv("STAND_IN", stand_in(folder / "python")["STAND_IN"])
    run = Run(folder / "run", short, python=folder / "python")
    arguments = run.command()["args"][2:]

    def told_on():
        runpy.run_path(str(folder / "python/sitecustomize.py"))
        sys.argv = arguments
        snakemake.cli.main(arguments[1:])

    done = run.forked(told_on)
    assert done.returncode == 0, done.stderr + done.stdout
    return Run(folder / "run", short)


@pytest.fixture(scope="module")
def executed(mixture):
    """The files of this package whose functions each command executed."""
    found: dict[str, set[str]] = {}
    for file in (mixture.folder.parent / "seen").glob("*.txt"):
        arguments, *names = file.read_text().splitlines()
        command = arguments.partition(" ")[0]
        stage = "tasks" if command == "evaluate" and '"tasks":' in arguments else command
        stage = "serving" if command == "benchmark" and '"engine":' in arguments else stage
        stage = "experts" if "--experts" in arguments else stage
        found.setdefault(stage, set()).update(names)
    return found


def test_a_mixture_goes_through_all_stages_in_groups_of_experts_and_a_second_run_does_nothing(mixture):
    results = mixture.folder / "results"
    reruns = Reruns(results, Config.model_validate(mixture.config))
    assert {job: reruns.reasons(job) for job in reruns.jobs if reruns.reasons(job)} == {}
    status = read_status(results, reruns.config)
    assert [job for job in reruns.jobs if not job.measured.is_file()] == []
    assert {job.stage for job in status.states} == {*STAGES} and {*status.states.values()} == {"done"}
    groups = [str(job) for job in status.states if job.stage == "experts"]
    assert groups == [f"experts tiny tuned layer 0 {experts}" for experts in ("0-1", "2-3")]
    assert not list((results / "tiny/tuned/experts").rglob("*.safetensors"))  # the layer has them
    assert mixture.would_run() == {}
    assert mixture.would_run(mixture.edited(benchmarks__decode__repeats=3)) == {"benchmark": 1, "report": 1}
    tuned = mixture.would_run(mixture.edited(recipes__tuned__tune__rate=1e-4))
    assert tuned == {"tune": 1, "assemble": 1, "evaluate": 1, "tasks": 1, "benchmark": 1, "report": 1}


@pytest.mark.parametrize("stage", STAGES)
def test_the_hash_covers_every_module_that_a_stage_executes(executed, config, stage):
    settings = Config.model_validate(config)
    methods = [module for recipe in settings.recipes for module in settings.layer_settings(recipe, 0).code()]
    entries = [STAGES[stage].entry, *(methods if stage in ("price", "experts", "factorize") else [])]
    hashed = {str(fingerprint.modules()[name].relative_to(REPOSITORY)) for name in fingerprint.executed_by(*entries)}
    free = {str(fingerprint.modules()[name].relative_to(REPOSITORY)) for name in fingerprint.WITHOUT_EFFECT}
    missing = {file for file in executed[stage] - hashed - free - SAID.get(stage, set()) if not file.startswith(AROUND)}
    assert missing == set() and len(executed[stage]) > 5
