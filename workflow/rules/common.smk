"""The checked configuration and the small functions that the rules share. No rules.

`SETTINGS` is the configuration as types (armor.config.run), `R` has every path (armor.format.layout), and the table of
jobs (armor.run.stages) what a stage reads of other jobs and of the configuration, and which code it executes. A rule
passes on no more than that, as JSON text in its params, so that an edit reruns just what it touches.
"""

import itertools
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

from armor.command import forkserver
from armor.config.reading import parse_settings, read_yaml
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.layout import FACTORS, Results
from armor.format.names import beside, factors_beside
from armor.run.explain import Reruns
from armor.run.jobs import Job, jobs_of, read_topology
from armor.run.progress import typed
from armor.run.stages import CLUSTER_CORES, STAGES
from armor.run.status import read_status, start_run, summary
from armor.serve.engine import check_asked
from armor.serve.families import check_type

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
# On object storage (docs/STORAGE.md) Snakemake puts a job's files there, and has copies of them below another folder.
STORED = workflow.storage_settings.default_storage_provider is not None


def in_storage(path):
    """A path of the results as Snakemake has it: on object storage that of the copy, with the object in its flags."""
    return workflow.modifier.path_modifier.apply_default_storage(str(path))


def object_of(path):
    """The object of a result on object storage."""
    return in_storage(path).flags["storage_object"]


def key(path):
    """What Snakemake's own records call a result."""
    return object_of(path).query if STORED else path


HERE = Results(str(in_storage(R.root)))
ASKED = Results(f"{HERE.root}.records") if STORED else R
"""Records that are copied to be asked. They may not lie in HERE: there Snakemake takes a part of a folder for all."""
MADE = [name for name, model in SETTINGS.models.items() if not (model.hub or model.folder)]
"""Models whose folder `fetch` makes."""

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # not given: --unlock, --summary, a cluster
    ALL_CORES = CLUSTER_CORES


def any_of(names):
    """A regular expression that matches exactly these names."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def served():
    """What this run has behind a server: all that is asked for, where the jobs behind a checkpoint are not known yet."""
    jobs = list(workflow.dag.needrun_jobs())
    if {"inspect", "report"} <= {job.rule.name for job in jobs}:
        return SETTINGS.served()
    tasks = {f"evaluations.{job.wildcards.evaluation}" for job in jobs if job.rule.name == "tasks"}
    timed = {f"benchmarks.{job.wildcards.benchmark}" for job in jobs if job.rule.name == "serving"}
    return [key for key in SETTINGS.served() if key in tasks | timed]


onstart:
    try:
        check_asked(served())
        start_run(Path(HERE.root), SETTINGS, typed(sys.argv))
    except ArmorError as error:
        raise WorkflowError(str(error)) from None
    if workflow.local_exec:
        forkserver.start()
    limiter = workflow.scheduler.job_rate_limiter
    # For its default limit of 100 starts a second Snakemake looks for jobs once a second more for each job that has
    # ended: half a core after some hundreds. It looks whenever a job ends, so without a limit nothing waits.
    if limiter and (limiter.max_jobs, limiter.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


onsuccess:
    for names in {(model, name) for (model, _), asked in PAIRS.items() for name in asked.texts}:
        Path(HERE.logits(*names)).unlink(missing_ok=True)  # only evaluations need them
    if not workflow.storage_settings.notemp:  # what a run that was killed has left, and no layer needs any more
        waiting = {states_behind(*job.names) for job in jobs_known("refined") if waits_for_states(job)}
        for names in {*itertools.product(SETTINGS.models, SETTINGS.states())} - waiting:
            shutil.rmtree(beside(HERE.states(*names)), ignore_errors=True)
    print(*summary(Path(HERE.root), SETTINGS), sep="\n", file=sys.stderr)
    if os.path.isfile(page := HERE.report()[0]):
        print(f"the report: {os.path.relpath(page, os.environ.get('PWD', '.'))}", file=sys.stderr)


onerror:
    print(*summary(Path(HERE.root), SETTINGS), sep="\n", file=sys.stderr)
    print(*read_status(Path(HERE.root), SETTINGS, running=False).details(), sep="\n", file=sys.stderr)


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


def text(stage):
    """The fingerprint of the local files of text that a job reads, by its wildcards: an edit makes it run again."""
    return lambda wildcards: Job(stage, tuple(wildcards), HERE).text(SETTINGS) or ""


def jobs_known(stage, names=()):
    """The jobs of one stage, as armor.run.jobs.jobs_of has them.

    Where they are one for each decoder layer the model is inspected first. Then it is also known whether the recipe's
    patterns match any of its modules.
    """
    row = STAGES[stage]
    if row.by_layer and len(names) < (4 if row.by_group else 3):
        for model, recipe in [names[:2]] if names else dict.fromkeys(row.asked(SETTINGS)):
            checkpoints.inspect.get(model=model)
            brought(R.topology(model))
            check_modules(model, recipe)
            check_served(model)
    found = list(jobs_of(SETTINGS, stage, HERE, names))
    again_if_interrupted(found)
    again_if_unknown(found)
    again_if_left(found)
    return [Job(job.stage, job.names) for job in found]


def files_of(job):
    """What Snakemake is told that comes of a job, first of all that which others read."""
    more = [str(beside(job.results.source(*job.names)))] if job.stage == "fetch" and job.names[0] in MADE else []
    return [*job.stored, *more] if STORED else [str(path) for path in job.outputs]


def stored(stage, *wildcards):
    """Outputs that a job has on object storage alone: what it makes beside the first."""
    job = Job(stage, tuple(f"{{{name}}}" for name in wildcards))
    return [file if Path(file).suffix else directory(file) for file in job.stored[1:]] if STORED else []


def stored_for(stage, by=None):
    """Inputs that a job has on object storage alone: what the makers of its inputs, or `by` one, made beside."""

    def files(wildcards):
        inputs = Job(stage, tuple(wildcards)).inputs(SETTINGS) if STORED else []
        read = [(maker, names) for _, maker, names in inputs if by in (None, maker)]
        return [file for maker, names in read for job in jobs_known(maker, names) for file in files_of(job)[1:]]

    return files


def brought(path):
    """Copy a file from object storage, if there is none here yet: to read it before any job does."""
    if STORED and not os.path.exists(in_storage(path)) and (found := object_of(path)).exists():
        found.local_path().parent.mkdir(parents=True, exist_ok=True)
        found.retrieve_object()


@cache
def check_modules(model, recipe):
    """Refuse a recipe with a pattern that matches no module of the model, and with a layer that it has not."""
    topology = read_topology(HERE, model)
    try:
        SETTINGS.check_model(recipe, model, (linear.name for linear in topology.linears()), len(topology.layers))
    except ArmorError as error:
        raise WorkflowError(str(error)) from None


@cache
def check_served(model):
    """Refuse to serve packed what vLLM was not tested with, before it is made."""
    for stage, kind in (("tasks", "evaluations"), ("serving", "benchmarks")):
        for job in jobs_of(SETTINGS, stage, HERE):
            packed = any(maker == "assemble" for _, maker, _ in job.inputs(SETTINGS))
            if job.names[0] == model and packed and job.settings(SETTINGS).engine:
                where = f"{kind}.{job.names[-1]}.engine, model {model}"
                try:
                    check_type(read_topology(HERE, model).model_type, where)
                except ArmorError as error:
                    raise WorkflowError(str(error)) from None


def needed(stage, name=None, by=None):
    """The files that a job of `stage` reads from others: those that the table of jobs calls `name`, or made `by` one."""

    def files(wildcards):
        inputs = Job(stage, tuple(wildcards)).inputs(SETTINGS)
        read = [(maker, names) for called, maker, names in inputs if called == name or maker == by]
        return [files_of(job)[0] for maker, names in read for job in jobs_known(maker, names)]

    return files


def group_factors(wildcards):
    """The factors of a layer's groups of experts, which go once the layer has them."""
    return [str(factors_beside(record)) for record in needed("factorize", "experts")(wildcards)]


def folder_needed(stage):
    """The folder of the factors that a job of `stage` reads."""

    def folder(wildcards):
        inputs = Job(stage, tuple(wildcards)).inputs(SETTINGS)
        maker, (model, recipe, *_) = next(found for called, *found in inputs if called == "factors")
        return HERE.layers(model, recipe, maker)

    return folder


def summed_up(behind):
    """The records that sum up the refinements before a recipe: while jobs wait for them, the states are kept.

    `behind` their layers, which then were refined by a run that was killed, or not. What makes the former run makes the
    recipe's factors new too; Snakemake does not see that by itself, as it does not look further behind a job that runs.
    """

    def files(wildcards):
        owners = (owner for stage, owner in SETTINGS.chain(wildcards.recipe) if stage == "refine")
        found = [job for owner in owners for job in jobs_known("refined", (wildcards.model, owner))]
        return [str(job.record) for job in found if is_behind(job) == behind]

    return files


@cache
def is_behind(job):
    """Whether a job's record is older than a file that it is made of, as the run begins."""
    made = [files_of(other)[0] for _, stage, names in job.inputs(SETTINGS) for other in jobs_known(stage, names)]
    return is_older(job.record, made)


def is_older(record, files):
    """Whether a record is there, and older than one of the files that are there."""
    times = [os.path.getmtime(file) for file in (record, *files) if os.path.isfile(file)]
    return record.is_file() and max(times) > times[0]


def states_behind(model, recipe):
    """The names of the hidden states that a recipe is refined on."""
    return model, SETTINGS.states_of(recipe)


def waits_for_states(job):
    """Whether a recipe's refinement was not summed up since the states were made that it was asked for."""
    return not job.record.is_file() or is_older(job.record, [R.states(*states_behind(*job.names))])


def states_for(wildcards):
    """The hidden states that a layer is refined on. They are ancient: made again for one layer, they alone make no
    other layer run again. After stale ones all layers have to."""
    files = needed("refine", "states")(wildcards)
    return files if are_stale(*states_behind(*wildcards[:2])) else [ancient(file) for file in files]


def is_chained(wildcards):
    """Whether a layer's input is what the refined layers before it make of the text."""
    return SETTINGS.refine_settings(wildcards.recipe).refine.inputs == "compressed"


def again_if_interrupted(found):
    """Snakemake looks for what an interrupted run left before it knows of jobs behind a checkpoint (here: nearly all),
    and so misses the files that were there when it was killed but not yet recorded. Unrecorded, no edit would ever run
    them again."""
    known = {key(file): in_storage(file) for job in found for file in files_of(Job(job.stage, job.names))}
    for job in found:
        if job.stage in ("states", "refined"):
            take_for_whole(job.stage, job.names)
    workflow.dag.forcefiles.update(known[file] for file in workflow.persistence._filter_incomplete_keys(known))


@cache
def take_for_whole(stage, names):
    """Before anything runs, let Snakemake forget that a job was interrupted whose record is whole if it is there.

    Every edit comes to it through a layer. If it ran for its own sake, layers behind it that are due would be passed
    over, and for a summary all hidden states be made again.
    """
    if workflow.is_main_process:
        for file in Job(stage, names).stored:
            workflow.persistence._unmark_incomplete(key(file))


def again_if_unknown(found):
    """Results that were copied without .snakemake are unknown to Snakemake, which takes what is there for up to date.
    So their records are asked."""
    try:
        for job in found:
            if job.names and is_unknown(job.names[0]):
                asked = [Job("fetch", job.names[:1], ASKED), Job(job.stage, job.names, ASKED)]
                bring_records(asked[1])
                again = [Job(one.stage, one.names) for one in asked if reruns().reasons(one)]
                workflow.dag.forcefiles.update(in_storage(file) for one in again for file in files_of(one))
    except ArmorError as error:
        raise WorkflowError(str(error)) from None


def again_if_left(found):
    """Hidden states that a run left, and that today's text, settings or code would not make, are made again. As
    `refine` then does not take them for ancient, so are the layers that wait for them."""
    for job in found:
        if job.stage == "states" and are_stale(*job.names):
            workflow.dag.forcefiles.update(in_storage(file) for file in files_of(Job(job.stage, job.names)))


@cache
def are_stale(*names):
    """Whether hidden states lie there, as the run begins, that their record does not say are those asked for."""
    if STORED or not workflow.is_main_process or not beside(HERE.states(*names)).is_dir():
        return False
    return bool(reruns().own(Job("states", names, ASKED)))


@cache
def is_unknown(model):
    """Whether a model was fetched in an earlier run, and Snakemake knows nothing of it when this one begins."""
    source = R.source(model)
    if not workflow.is_main_process or workflow.persistence._read_record(key(source)):
        return False
    return object_of(source).exists() if STORED else os.path.isfile(source) and os.path.isfile(R.run())


@cache
def bring_records(job):
    """Copy from object storage what the reasons to run `job` again are read from: the records up to it."""
    if STORED:
        found = object_of(Job(job.stage, job.names).record)
        if found.exists():
            job.record.parent.mkdir(parents=True, exist_ok=True)
            found.set_local_path(job.record)
            found.retrieve_object()
        if job.stage not in ("fetch", "inspect"):
            bring_records(Job("inspect", job.names[:1], ASKED))
        for _, other in job.before(SETTINGS):
            bring_records(other)


def is_there(file):
    """Whether a file of ASKED is among the results."""
    return object_of(Path(R.root, file.relative_to(ASKED.root))).exists() if STORED else file.is_file()


@cache
def reruns():
    """What the records say of every job, as `armor explain` does."""
    return Reruns(Path(ASKED.root), SETTINGS, is_there)


def all_records(wildcards):
    """Every record that the report is made of."""
    found = [job for _, stage, names in Job("report", ()).inputs(SETTINGS) for job in jobs_known(stage, names)]
    return [str(job.record) if str(job.record) in files_of(job) else files_of(job)[0] for job in found]


def all_factors(wildcards):
    """Every factors file and every budget.

    They are final targets. Else Snakemake would not miss one that was deleted, for only rules that are done ask for it.
    """
    return [str(job.outputs[0]) for stage in ("budget", *FACTORS) for job in jobs_known(stage)]
