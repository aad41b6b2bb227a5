"""The checked configuration and the small functions that the rules share. No rules.

`SETTINGS` is the configuration as types (armor.config.run), `R` has every path (armor.format.layout), and the table of
jobs (armor.run.jobs) what a stage reads of other jobs and of the configuration, and which code it executes. A rule
passes on no more than that, as JSON text in its params, so that an edit reruns just what it touches.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

from armor.command import forkserver
from armor.config.reading import parse_settings, read_yaml
from armor.config.layers import check_patterns
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.layout import FACTORS, RUN, Results
from armor.format.names import beside, factors_beside
from armor.run.explain import Reruns
from armor.run.jobs import CLUSTER_CORES, STAGES, Job, jobs_of, read_topology
from armor.run.progress import typed
from armor.run.status import read_status, start_run, summary
from armor.serve.engine import check_asked

# The `armor` of this Python, also in jobs whose shell has another one.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]),
    ARMOR_PIPELINE=str(workflow.current_basedir.join("../..")),  # this repository, for envs/armor.post-deploy.sh
)

DEMO = os.path.normpath(str(workflow.current_basedir.join("../../config/config.yaml")))
COPY = os.path.isfile(DEMO) and os.path.normpath(workflow.source_path("../../config/config.yaml"))
"""What Snakemake itself has read of it. A pod may have neither, nor does a workflow that is deployed from elsewhere."""

try:
    for file in workflow.configfiles:  # Snakemake has read them, and would not say that a key stands in one twice
        read_yaml(Path(DEMO if file == COPY else file))
    SETTINGS = parse_settings(Config, config, "configuration")
except ArmorError as error:
    raise WorkflowError(str(error)) from None
PAIRS = SETTINGS.pairs()
R = Results()

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # not given: --unlock, --summary, a cluster
    ALL_CORES = CLUSTER_CORES


def any_of(names):
    """A regular expression that matches exactly these names."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


onstart:
    try:
        check_asked(SETTINGS.served())
        start_run(Path(R.root), SETTINGS, typed(sys.argv))
    except ArmorError as error:
        raise WorkflowError(str(error)) from None
    if workflow.local_exec:
        forkserver.start()


onsuccess:
    for names in {(model, name) for (model, _), asked in PAIRS.items() for name in asked.texts}:
        Path(R.logits(*names)).unlink(missing_ok=True)  # only evaluations need them
    print(*summary(Path(R.root), SETTINGS), sep="\n", file=sys.stderr)
    if os.path.isfile(page := R.report()[0]):
        print(f"the report: {os.path.relpath(page, os.environ.get('PWD', '.'))}", file=sys.stderr)


onerror:
    print(*summary(Path(R.root), SETTINGS), sep="\n", file=sys.stderr)
    print(*read_status(Path(R.root), SETTINGS, running=False).details(), sep="\n", file=sys.stderr)


wildcard_constraints:
    model=any_of(SETTINGS.models),
    recipe=any_of(SETTINGS.recipes),
    calibration=any_of(SETTINGS.calibrations),
    states=any_of(SETTINGS.states()),
    sensitivity=any_of(SETTINGS.sensitivities()),
    evaluation=any_of(SETTINGS.evaluations),
    benchmark=any_of(SETTINGS.benchmarks),
    layer=r"\d+",
    experts=r"\d+-\d+",


def settings(stage):
    """A job's settings as JSON text, by its wildcards."""
    return lambda wildcards: Job(stage, tuple(wildcards)).settings_json(SETTINGS)


def code(stage):
    """The hash of the code that a job executes, by its wildcards."""
    return lambda wildcards: Job(stage, tuple(wildcards)).code(SETTINGS)


def jobs_known(stage, names=()):
    """The jobs of one stage, as armor.run.jobs.jobs_of has them.

    Where they are one for each decoder layer the model is inspected first. Then it is also known whether the recipe's
    patterns match any of its modules.
    """
    row = STAGES[stage]
    if row.by_layer and len(names) < (4 if row.by_group else 3):
        for model, recipe in [names[:2]] if names else dict.fromkeys(row.asked(SETTINGS)):
            checkpoints.inspect.get(model=model)
            check_modules(model, recipe)
    found = list(jobs_of(SETTINGS, stage, R, names))
    again_if_interrupted([str(path) for job in found for path in job.outputs])
    again_if_unknown(found)
    return found


@cache
def check_modules(model, recipe):
    """Refuse a recipe with a pattern that matches no module of the model."""
    linears = (linear.name for linear in read_topology(R, model).linears())
    try:
        check_patterns(f"recipes.{recipe}, model {model}", SETTINGS.module_patterns(recipe), linears)
    except ArmorError as error:
        raise WorkflowError(str(error)) from None


def needed(stage, name=None, by=None):
    """The files that a job of `stage` reads from others: those that the table of jobs calls `name`, or made `by` one."""

    def files(wildcards):
        inputs = Job(stage, tuple(wildcards)).inputs(SETTINGS)
        read = [(maker, names) for called, maker, names in inputs if called == name or maker == by]
        return [str(job.outputs[0]) for maker, names in read for job in jobs_known(maker, names)]

    return files


def group_factors(wildcards):
    """The factors of a layer's groups of experts, which go once the layer has them."""
    return [str(factors_beside(record)) for record in needed("factorize", "experts")(wildcards)]


def folder_needed(stage):
    """The folder of the factors that a job of `stage` reads."""

    def folder(wildcards):
        inputs = Job(stage, tuple(wildcards)).inputs(SETTINGS)
        maker, (model, recipe, *_) = next(found for called, *found in inputs if called == "factors")
        return R.layers(model, recipe, maker)

    return folder


def summed_up(wildcards):
    """The records that sum up the refinements behind a recipe: while they wait for them, the states are kept."""
    made = SETTINGS.made_by(wildcards.recipe)
    owners = (owner for stage, owner in made if stage == "refine")
    return [str(job.record) for owner in owners for job in jobs_known("refined", (wildcards.model, owner))]


def states_folder(wildcards):
    """The folder of the hidden states that a recipe is refined on."""
    return str(beside(R.states(wildcards.model, SETTINGS.states_of(wildcards.recipe))))


def is_chained(wildcards):
    """Whether a layer's input is what the refined layers before it make of the text."""
    return SETTINGS.refine_settings(wildcards.recipe).refine.inputs == "compressed"


def again_if_interrupted(files):
    """Snakemake looks for what an interrupted run left before it knows of jobs behind a checkpoint (here: nearly all),
    and so misses the files that were there when it was killed but not yet recorded. Unrecorded, no edit would ever run
    them again."""
    workflow.dag.forcefiles.update(workflow.persistence._filter_incomplete_keys(files))


def again_if_unknown(found):
    """Results that were copied without .snakemake are unknown to Snakemake, which takes what is there for up to date.
    So their records are asked."""
    try:
        for job in found:
            if job.names and (source := unknown_source(job.names[0])):
                again = [one for one in (source, job) if reruns().reasons(one)]
                workflow.dag.forcefiles.update(str(path) for one in again for path in one.outputs)
    except ArmorError as error:
        raise WorkflowError(str(error)) from None


@cache
def unknown_source(model):
    """The job that fetched a model in an earlier run, if Snakemake knows nothing of it when this one begins."""
    job = Job("fetch", (model,))
    earlier = job.record.is_file() and Path(R.root, RUN).is_file()
    return job if earlier and not workflow.persistence._read_record(str(job.record)) else None


@cache
def reruns():
    """What the records say of every job, as `armor explain` does."""
    return Reruns(Path(R.root), SETTINGS)


def all_records(wildcards):
    """Every record that the report is made of."""
    return [
        str(job.record) for _, stage, names in Job("report", ()).inputs(SETTINGS) for job in jobs_known(stage, names)
    ]


def all_factors(wildcards):
    """Every factors file and every budget.

    They are final targets. Else Snakemake would not miss one that was deleted, for only rules that are done ask for it.
    """
    return [str(job.outputs[0]) for stage in ("budget", *FACTORS) for job in jobs_known(stage)]
