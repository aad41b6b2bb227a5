"""In: one decoder layer's weights and statistics. Out: its factors, and what is known of them (losses, seconds)."""


rule factorize:
    """Compress the linears of one decoder layer: one job, one device."""
    input:
        source=R.source(),
        model=R.topology(),
        calibration=needed("factorize", "calibration"),
        budget=needed("factorize", "budget"),
    output:
        factors=R.factors(),
        record=R.layer(),
    log:
        R.log("factorize", "{model}", "{recipe}", "{layer}"),
    benchmark:
        R.measured("factorize", "{model}", "{recipe}", "{layer}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="4h",
    params:
        settings=settings("factorize"),
        budget=lambda wildcards, input: [f"--budget={file}" for file in input.budget],
        code=code("factorize"),
    message:
        "factorize {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor factorize --source {input.source:q} --model {input.model:q} --calibration {input.calibration:q} \
            --layer {wildcards.layer} --settings {params.settings:q} {params.budget:q} --output {output.factors:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
