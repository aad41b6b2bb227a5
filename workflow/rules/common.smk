"""The checked configuration and the small functions that the rules share. No rules.

`SETTINGS` is the configuration as types (armor.config). A rule passes on no more of it than its stage reads, as JSON
text in its params, so that an edit reruns just what it touches; `code` in the params is the hash of the code that the
stage executes, so that a changed solver reruns factorize and what follows, and a changed report the report.
"""

import json
import os
import re
import sys
from pathlib import Path

from armor.config import Config, check_patterns
from armor.errors import ArmorError
from armor import forkserver
from armor.execution.fingerprint import code_hash
from armor.model.topology import read_topology
from armor.reading import parse_settings
from armor.status import read_status, start_run, summary

# The `armor` of this Python, also in jobs whose shell has another one.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]),
    ARMOR_PIPELINE=str(workflow.basedir),  # for envs/armor.post-deploy.sh
)

try:
    SETTINGS = parse_settings(Config, config, "configuration")
except ArmorError as error:
    raise WorkflowError(str(error)) from None
PAIRS = SETTINGS.pairs()

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # not given: --unlock, --summary, a cluster
    ALL_CORES = 8


def any_of(names):
    """A regular expression that matches exactly these names."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


onstart:
    try:
        start_run(Path("results"), SETTINGS, sys.argv)
    except ArmorError as error:
        raise WorkflowError(str(error)) from None
    if workflow.local_exec:
        forkserver.start()


onsuccess:
    print(*summary(Path("results"), SETTINGS), sep="\n", file=sys.stderr)
    if os.path.isfile(page := "results/report/index.html"):
        print(f"the report: {os.path.relpath(page, os.environ.get('PWD', '.'))}", file=sys.stderr)


onerror:
    print(*summary(Path("results"), SETTINGS), sep="\n", file=sys.stderr)
    print(*read_status(Path("results"), SETTINGS, running=False).details(), sep="\n", file=sys.stderr)


wildcard_constraints:
    model=any_of(SETTINGS.models),
    recipe=any_of(SETTINGS.recipes),
    calibration=any_of(SETTINGS.calibrations),
    evaluation=any_of(SETTINGS.evaluations),
    benchmark=any_of(SETTINGS.benchmarks),
    layer=r"\d+",


def settings_json(settings):
    """Settings of one stage, defaults and all, as JSON text with sorted keys: equal settings, equal text."""
    return json.dumps(settings.model_dump(mode="json", exclude_none=True), sort_keys=True)


def is_dense(recipe):
    """Whether `recipe` leaves the model as it is, so that there is nothing to factorize."""
    return SETTINGS.recipes[recipe].method == "dense"


def factors_of(model, recipe, suffix):
    """The files of every decoder layer of one model and recipe: their factors (safetensors) or their records (json).

    Known once the model was inspected; so is then whether the recipe's patterns match any of its modules.
    """
    topology = read_topology(checkpoints.inspect.get(model=model).output[0])
    try:
        names = (linear.name for linear in topology.linears())
        check_patterns(f"recipes.{recipe}, model {model}", SETTINGS.module_patterns(recipe), names)
    except ArmorError as error:
        raise WorkflowError(str(error)) from None
    files = [f"results/{model}/{recipe}/layers/layer_{layer.index}.{suffix}" for layer in topology.layers]
    again_if_interrupted(files)
    return files


def again_if_interrupted(files):
    """Snakemake looks for what an interrupted run left before it knows of jobs behind a checkpoint (here: nearly all),
    and so misses the files that were there when it was killed but not yet recorded. Unrecorded, no edit would ever run
    them again."""
    workflow.dag.forcefiles.update(workflow.persistence._filter_incomplete_keys(files))


def all_records(wildcards):
    """Every JSON file that the configuration asks for: what the report is made of."""
    files = []
    for (model, recipe), tasks in PAIRS.items():
        folder = f"results/{model}/{recipe}"
        files += [f"{folder}/evaluation/{name}.json" for name in tasks["evaluations"]]
        files += [f"{folder}/benchmark/{name}.json" for name in tasks["benchmarks"]]
        if not is_dense(recipe):
            calibration = SETTINGS.calibration_of(recipe)
            files += [f"results/{model}/calibration/{calibration}/calibration.json", f"{folder}/checkpoint.json"]
            files += factors_of(model, recipe, "json")
    again_if_interrupted(files)
    return list(dict.fromkeys(files))


def all_factors(wildcards):
    """Every factors file. A final target too: Snakemake does not miss a deleted file that only other rules ask for."""
    return [
        file for model, recipe in PAIRS if not is_dense(recipe) for file in factors_of(model, recipe, "safetensors")
    ]


def finished_model(wildcards):
    """What evaluation reads: the checkpoint of a recipe, or the source where the recipe leaves the model as it is."""
    if is_dense(wildcards.recipe):
        return f"results/{wildcards.model}/source.json"
    return f"results/{wildcards.model}/{wildcards.recipe}/checkpoint.json"
