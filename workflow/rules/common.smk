"""The checked configuration and the small functions that the rules share. No rules.

`SETTINGS` is the configuration as types (armor.config.run), `R` has every path (armor.format.layout), and the table of
jobs (armor.run.jobs) what of the configuration a stage reads and which code it executes. A rule passes on no more than
that, as JSON text in its params, so that an edit reruns just what it touches.
"""

import os
import re
import sys
from pathlib import Path

from armor.command import forkserver
from armor.config.reading import parse_settings, read_yaml
from armor.config.layers import check_patterns
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.layout import Results
from armor.format.names import beside
from armor.format.records.topology import Topology
from armor.run.jobs import Job
from armor.run.progress import typed
from armor.run.status import read_status, start_run, summary

# The `armor` of this Python, also in jobs whose shell has another one.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]),
    ARMOR_PIPELINE=str(workflow.current_basedir.join("../..")),  # this repository, for envs/armor.post-deploy.sh
)

try:
    for file in workflow.configfiles:  # Snakemake has read them, and would not say that a key stands in one twice
        read_yaml(Path(file))
    SETTINGS = parse_settings(Config, config, "configuration")
except ArmorError as error:
    raise WorkflowError(str(error)) from None
PAIRS = SETTINGS.pairs()
R = Results()

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # not given: --unlock, --summary, a cluster
    ALL_CORES = 8


def any_of(names):
    """A regular expression that matches exactly these names."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


onstart:
    try:
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


def settings(stage):
    """A job's settings as JSON text, by its wildcards."""
    return lambda wildcards: Job(stage, tuple(wildcards)).settings_json(SETTINGS)


def code(stage):
    """The hash of the code that a job executes, by its wildcards."""
    return lambda wildcards: Job(stage, tuple(wildcards)).code(SETTINGS)


def factors_of(model, recipe, path=R.factors):
    """The files of every decoder layer that become the checkpoint of one model and recipe, or those beside them.

    `path` is R.factors or R.layer. Those of a tuned model are one job's: its record. The model is inspected first. Then
    it is also known whether the recipe's patterns match any of its modules.
    """
    stage, owner = SETTINGS.made_by(recipe)[-1]
    return factors_by(stage, model, owner, path)


def factors_by(stage, model, recipe, path=R.factors):
    """The files that `stage` makes of every decoder layer for `recipe`."""
    topology = Topology.read(checkpoints.inspect.get(model=model).output[0])
    try:
        names = (linear.name for linear in topology.linears())
        check_patterns(f"recipes.{recipe}, model {model}", SETTINGS.module_patterns(recipe), names)
    except ArmorError as error:
        raise WorkflowError(str(error)) from None
    files = [R.tuned(model, recipe)]
    if stage != "tune":
        files = [path(model, recipe, layer.index, stage) for layer in topology.layers]
    again_if_interrupted(files)
    return files


def budget_of(wildcards):
    """The record that chooses for each linear, of a recipe with a budget."""
    chosen = SETTINGS.recipes[wildcards.recipe].budget is not None
    return [R.budget(wildcards.model, wildcards.recipe)] if chosen else []


def prices_of(wildcards):
    """The prices of every decoder layer."""
    return factors_by("price", wildcards.model, wildcards.recipe, lambda *names: R.prices(*names[:3]))


def summed_up(wildcards):
    """The records of the refinements behind a recipe."""
    made = SETTINGS.made_by(wildcards.recipe)
    return [R.refined(wildcards.model, owner) for stage, owner in made if stage == "refine"]


def final_layers(wildcards):
    """The folder of the factors that become a checkpoint."""
    stage, owner = SETTINGS.made_by(wildcards.recipe)[-1]
    return R.layers(wildcards.model, owner, stage)


def trained_from(stage):
    """The files of the factors from which a training starts: those of the job's layer, or of all."""

    def files(wildcards):
        made, owner = SETTINGS.before(stage, wildcards.recipe)
        if stage == "refine" and made != "tune":
            return R.factors(wildcards.model, owner, wildcards.layer, made)
        return factors_by(made, wildcards.model, owner)

    return files


def folder_before(stage):
    """The folder of these factors."""

    def folder(wildcards):
        made, owner = SETTINGS.before(stage, wildcards.recipe)
        return R.layers(wildcards.model, owner, made)

    return folder


def is_chained(wildcards):
    """Whether a layer's input is what the refined layers before it make of the text."""
    return SETTINGS.refine_settings(wildcards.recipe).refine.inputs == "compressed"


def refined_before(wildcards):
    """The refined layers that must go before a chained one."""
    layers = range(int(wildcards.layer) if is_chained(wildcards) else 0)
    return [R.factors(wildcards.model, wildcards.recipe, layer, "refine") for layer in layers]


def states_of(wildcards):
    """The record of the hidden states that a recipe is refined on; they lie in the folder of its name."""
    return R.states(wildcards.model, SETTINGS.states_of(wildcards.recipe))


def folder_of(record):
    return str(beside(record))


def again_if_interrupted(files):
    """Snakemake looks for what an interrupted run left before it knows of jobs behind a checkpoint (here: nearly all),
    and so misses the files that were there when it was killed but not yet recorded. Unrecorded, no edit would ever run
    them again."""
    workflow.dag.forcefiles.update(workflow.persistence._filter_incomplete_keys(files))


def all_records(wildcards):
    """Every JSON file that the configuration asks for: what the report is made of."""
    files = []
    for (model, recipe), asked in PAIRS.items():
        files += [R.evaluation(model, recipe, name) for name in (*asked.texts, *asked.tasks)]
        files += [R.benchmark(model, name) for name in asked.benchmarks]
        if not SETTINGS.is_dense(recipe):
            files += [R.calibration(model, SETTINGS.calibration_of(recipe)), R.checkpoint(model, recipe)]
            files += factors_of(model, recipe, R.layer)
    again_if_interrupted(files)
    return list(dict.fromkeys(files))


def all_factors(wildcards):
    """Every factors file and every budget.

    They are final targets. Else Snakemake would not miss one that was deleted, for only rules that are done ask for it.
    """
    compressed = [pair for pair in PAIRS if not SETTINGS.is_dense(pair[1])]
    made = dict.fromkeys(
        (stage, model, owner) for model, recipe in compressed for stage, owner in SETTINGS.made_by(recipe)
    )
    files = [file for stage, model, owner in made for file in factors_by(stage, model, owner)]
    budgets = [R.budget(model, owner) for stage, model, owner in made if SETTINGS.recipes[owner].budget]
    return [*dict.fromkeys(budgets), *files]


def finished_model(wildcards):
    """What evaluation reads: the checkpoint of a recipe, or the source where the recipe leaves the model as it is."""
    is_dense = SETTINGS.is_dense(wildcards.recipe)
    return R.source(wildcards.model) if is_dense else R.checkpoint(wildcards.model, wildcards.recipe)


def benchmarked(wildcards):
    """The checkpoints that a benchmark times beside the dense model."""
    recipes = SETTINGS.benchmarked(wildcards.model, wildcards.benchmark)
    return [R.checkpoint(wildcards.model, recipe) for recipe in recipes]
