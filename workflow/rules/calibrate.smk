"""In: a model and the calibration text. Out: for every decoder layer, the statistics of its linears' inputs."""


rule calibrate:
    """Run the text through the model, one decoder layer in memory at a time."""
    input:
        source=R.source(),
        topology=R.topology(),
        more=stored_for("calibrate"),
    output:
        directory(str(Path(R.calibration()).parent)) if STORED else R.calibration(),
    log:
        R.log("calibrate", "{model}", "{calibration}"),
    benchmark:
        R.measured("calibrate", "{model}", "{calibration}")
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=settings("calibrate"),
        record=lambda wildcards: HERE.calibration(*wildcards),
        code=code("calibrate"),
        text=text("calibrate"),
    message:
        "calibrate {wildcards.model} {wildcards.calibration}"
    shell:
        """
        armor calibrate --source {input.source:q} --topology {input.topology:q} --settings {params.settings:q} \
            --output {params.record:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
