"""Optional. In: one decoder layer's factors, as they were found or trained. Out: the same as integers with scales."""


rule quantize:
    """Round the factors of one decoder layer to integers: one job, one device."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("quantize", "calibration"),
        factors=needed("quantize", "factors"),
        more=stored_for("quantize"),
    output:
        factors=R.factors(stage="quantize"),
        record=R.layer(stage="quantize"),
    log:
        R.log("quantize", "{model}", "{recipe}", "{layer}"),
    benchmark:
        R.measured("quantize", "{model}", "{recipe}", "{layer}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="1h",
    params:
        settings=settings("quantize"),
        factors=folder_needed("quantize"),
        code=code("quantize"),
    message:
        "quantize {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor quantize --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --factors {params.factors:q} --layer {wildcards.layer} --settings {params.settings:q} \
            --output {output.factors:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
