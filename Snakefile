"""ARMOR Pipeline: a causal language model in, a 2:4-packed checkpoint, its evaluation and a report out.

    snakemake --cores 2                          the demo of config/config.yaml
    snakemake --cores 8 --resources gpu=4 --configfile my.yaml

Everything is written below results/ in the working directory (choose another with --directory). The stages follow one
another as the rules are included here; each rule calls `armor STAGE` and nothing else.
"""

from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


if "models" not in config:  # a configuration given with --configfile replaces the demo's, instead of adding to it

    configfile: workflow.source_path("config/config.yaml")


include: "workflow/rules/common.smk"
include: "workflow/rules/model.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/budget.smk"
include: "workflow/rules/factorize.smk"
include: "workflow/rules/refine.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/assemble.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"


rule all:
    """The report on everything that the configuration asks for."""
    default_target: True
    input:
        R.report()[0],
        all_records,
        all_factors,
    message:
        "all results"
