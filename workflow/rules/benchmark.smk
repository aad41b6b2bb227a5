"""In: the dense model and a packed one. Out: size, memory and speed of both, timed in turn."""


rule benchmark:
    """Time dense and packed in one process; takes every core, so that nothing else runs beside it."""
    input:
        source=R.source(),
        model=finished_model,
    output:
        R.benchmark(),
    log:
        R.log("benchmark", "{model}", "{benchmark}"),
    benchmark:
        R.measured("benchmark", "{model}", "{benchmark}"),
    conda:
        "../../envs/armor.yaml"
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="2h",
    params:
        settings=settings("benchmark"),
        checkpoint=lambda wildcards, input: "" if is_dense(wildcards.recipe) else f"--checkpoint {input.model}",
        code=code("benchmark"),
    message:
        "benchmark {wildcards.model} {wildcards.recipe} {wildcards.benchmark}"
    shell:
        """
        armor benchmark --source {input.source:q} {params.checkpoint} --settings {params.settings:q} \
            --output {output:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
