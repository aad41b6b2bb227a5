"""In: a model, dense or packed. Out: perplexity and distance from the dense one, or tasks; a file for each evaluation."""

TEXTS = any_of(name for name, settings in SETTINGS.evaluations.items() if not settings.tasks)
TASKS = any_of(name for name, settings in SETTINGS.evaluations.items() if settings.tasks)


rule predict:
    """Run the dense model on the text of an evaluation, once for all recipes. Beside the record lie its logits.

    They are no output: if Snakemake made them again for one recipe, it would run every recipe's evaluation again. A run
    that succeeds removes them, and an evaluation that finds none runs the dense model too.
    """
    input:
        source=R.source(),
        more=stored_for("predict"),
    output:
        R.predictions(),
    log:
        R.log("predict", "{model}", "{evaluation}"),
    benchmark:
        R.measured("predict", "{model}", "{evaluation}")
    wildcard_constraints:
        evaluation=TEXTS,
    priority: 1  # before the layers of recipes, for a mistake in the text shows here
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=settings("predict"),
        code=code("predict"),
        text=text("predict"),
    message:
        "predict {wildcards.model} {wildcards.evaluation}"
    shell:
        """
        armor predict --source {input.source:q} --settings {params.settings:q} --output {output:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule evaluate:
    """Perplexity on blocks of text; of a compressed model also KL divergence and agreement with the dense one."""
    input:
        source=R.source(),
        model=needed("evaluate", "model"),
        predictions=needed("evaluate", "predictions"),
        more=stored_for("evaluate"),
    output:
        R.evaluation(),
    log:
        R.log("evaluate", "{model}", "{recipe}", "{evaluation}"),
    benchmark:
        R.measured("evaluate", "{model}", "{recipe}", "{evaluation}")
    wildcard_constraints:
        evaluation=TEXTS,
    priority: 1  # that of the dense model before the layers of others, for a mistake shows there
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=lambda wildcards: 24000 if SETTINGS.is_dense(wildcards.recipe) else 40000,  # two models if need be
        runtime="8h",
    params:
        settings=settings("evaluate"),
        dense=lambda wildcards, input: "" if SETTINGS.is_dense(wildcards.recipe) else f"--dense {input.source}",
        code=code("evaluate"),
        text=text("evaluate"),
    message:
        "evaluate {wildcards.model} {wildcards.recipe} {wildcards.evaluation}"
    shell:
        """
        armor evaluate --model {input.model:q} {params.dense} --predictions {input.predictions:q} \
            --settings {params.settings:q} --output {output:q} --threads {threads} --gpus {resources.gpu} \
            >{log:q} 2>&1
        """


rule tasks:
    """Accuracy on tasks, by lm-eval."""
    input:
        model=needed("tasks", "model"),
        files=lambda wildcards: [local(file) for file in SETTINGS.evaluations[wildcards.evaluation].task_files()],
        more=stored_for("tasks"),
    output:
        record=R.evaluation(),
        more=stored("tasks", "model", "recipe", "evaluation"),
    log:
        R.log("tasks", "{model}", "{recipe}", "{evaluation}"),
    benchmark:
        R.measured("tasks", "{model}", "{recipe}", "{evaluation}")
    wildcard_constraints:
        evaluation=TASKS,
    priority: 1  # that of the dense model before the layers of others, for a mistake shows there
    conda:
        "../../envs/armor.yaml"
    threads: lambda wildcards: ALL_CORES if SETTINGS.evaluations[wildcards.evaluation].engine else 8  # vLLM takes all
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="24h",
    params:
        settings=settings("tasks"),
        code=code("tasks"),
        text=text("tasks"),
    message:
        "tasks {wildcards.model} {wildcards.recipe} {wildcards.evaluation}"
    shell:
        """
        armor evaluate --model {input.model:q} --settings {params.settings:q} --output {output.record:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
