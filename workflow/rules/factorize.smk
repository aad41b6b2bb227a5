"""In: one decoder layer's weights and statistics. Out: its factors, and what is known of them (losses, seconds)."""


rule experts:
    """Compress a group of experts of a large mixture: one job, one device. The layer's job takes their factors over."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("experts", "calibration"),
        budget=needed("experts", "budget"),
        more=stored_for("experts"),
    output:
        record=R.experts(),
        factors=temp(str(factors_beside(R.experts()))),
    log:
        R.log("experts", "{model}", "{recipe}", "{layer}", "{experts}"),
    benchmark:
        R.measured("experts", "{model}", "{recipe}", "{layer}", "{experts}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="4h",
    params:
        settings=settings("experts"),
        budget=lambda wildcards, input: [f"--budget={file}" for file in input.budget],
        code=code("experts"),
    message:
        "experts {wildcards.model} {wildcards.recipe} layer {wildcards.layer} {wildcards.experts}"
    shell:
        """
        armor factorize --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --layer {wildcards.layer} --experts {wildcards.experts} --settings {params.settings:q} {params.budget:q} \
            --output {output.factors:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule factorize:
    """Compress the linears of one decoder layer: one job, one device."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("factorize", "calibration"),
        budget=needed("factorize", "budget"),
        groups=needed("factorize", "experts"),
        group_factors=group_factors,
        more=stored_for("factorize"),
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
        groups=lambda wildcards, input: [f"--group={file}" for file in input.groups],
        code=code("factorize"),
    message:
        "factorize {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor factorize --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --layer {wildcards.layer} --settings {params.settings:q} {params.budget:q} {params.groups:q} \
            --output {output.factors:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
