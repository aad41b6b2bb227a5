"""In: the dense model and its packed recipes. Out: size, memory and speed of all, timed in turn."""

ALONE = any_of(name for name, settings in SETTINGS.benchmarks.items() if not settings.engine)
SERVED = any_of(name for name, settings in SETTINGS.benchmarks.items() if settings.engine)


rule benchmark:
    """Time a model and its recipes in one process; takes every core, so that nothing else runs beside it."""
    input:
        source=R.source(),
        checkpoints=needed("benchmark", by="assemble"),
        more=stored_for("benchmark"),
    output:
        R.benchmark(),
    log:
        R.log("benchmark", "{model}", "{benchmark}"),
    benchmark:
        R.measured("benchmark", "{model}", "{benchmark}")
    wildcard_constraints:
        benchmark=ALONE,
    conda:
        "../../envs/armor.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="2h",
    params:
        settings=settings("benchmark"),
        checkpoints=lambda wildcards, input: [f"--checkpoint={file}" for file in input.checkpoints],
        code=code("benchmark"),
    message:
        "benchmark {wildcards.model} {wildcards.benchmark}"
    shell:
        """
        armor benchmark --source {input.source:q} {params.checkpoints:q} --settings {params.settings:q} \
            --output {output:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule serving:
    """Serve a model and its recipes in turn, under load; takes every core, for the server and its clients."""
    input:
        source=R.source(),
        checkpoints=needed("serving", by="assemble"),
        more=stored_for("serving"),
    output:
        R.benchmark(),
    log:
        R.log("serving", "{model}", "{benchmark}"),
    benchmark:
        R.measured("serving", "{model}", "{benchmark}")
    wildcard_constraints:
        benchmark=SERVED,
    conda:
        "../../envs/armor.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=settings("serving"),
        checkpoints=lambda wildcards, input: [f"--checkpoint={file}" for file in input.checkpoints],
        code=code("serving"),
    message:
        "serving {wildcards.model} {wildcards.benchmark}"
    shell:
        """
        armor benchmark --source {input.source:q} {params.checkpoints:q} --settings {params.settings:q} \
            --output {output:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
