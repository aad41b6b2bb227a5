"""In: a model, dense or packed. Out: perplexity and distance from the dense one, or tasks; a file for each evaluation."""


rule evaluate:
    """Perplexity on blocks of text; of a compressed model also KL divergence and agreement, the dense one beside it."""
    input:
        source=R.source(),
        model=finished_model,
    output:
        R.evaluation(),
    log:
        R.log("evaluate", "{model}", "{recipe}", "{evaluation}"),
    benchmark:
        R.measured("evaluate", "{model}", "{recipe}", "{evaluation}"),
    wildcard_constraints:
        evaluation=any_of(name for name, settings in SETTINGS.evaluations.items() if not settings.tasks),
    priority: 1  # that of the dense model before the layers of others, for a mistake shows there
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=lambda wildcards: 24000 if SETTINGS.is_dense(wildcards.recipe) else 40000,  # two models at once
        runtime="8h",
    params:
        settings=settings("evaluate"),
        dense=lambda wildcards, input: "" if SETTINGS.is_dense(wildcards.recipe) else f"--dense {input.source}",
        code=code("evaluate"),
    message:
        "evaluate {wildcards.model} {wildcards.recipe} {wildcards.evaluation}"
    shell:
        """
        armor evaluate --model {input.model:q} {params.dense} --settings {params.settings:q} --output {output:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule tasks:
    """Accuracy on tasks, by lm-eval."""
    input:
        model=finished_model,
        files=lambda wildcards: SETTINGS.evaluations[wildcards.evaluation].task_files(),
    output:
        R.evaluation(),
    log:
        R.log("tasks", "{model}", "{recipe}", "{evaluation}"),
    benchmark:
        R.measured("tasks", "{model}", "{recipe}", "{evaluation}"),
    wildcard_constraints:
        evaluation=any_of(name for name, settings in SETTINGS.evaluations.items() if settings.tasks),
    priority: 1  # that of the dense model before the layers of others, for a mistake shows there
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="24h",
    params:
        settings=settings("tasks"),
        code=code("tasks"),
    message:
        "tasks {wildcards.model} {wildcards.recipe} {wildcards.evaluation}"
    shell:
        """
        armor evaluate --model {input.model:q} --settings {params.settings:q} --output {output:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
