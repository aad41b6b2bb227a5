"""In: a model and the calibration text. Out: for every decoder layer, the statistics of its linears' inputs."""


rule calibrate:
    """Run the text through the model, one decoder layer in memory at a time."""
    input:
        source="results/{model}/source.json",
        model="results/{model}/model.json",
    output:
        "results/{model}/calibration/{calibration}/calibration.json",
    log:
        "results/logs/{model}/calibration/{calibration}.log",
    benchmark:
        "results/benchmarks/{model}/calibration/{calibration}.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=lambda wildcards: settings_json(SETTINGS.calibrations[wildcards.calibration]),
        code=code_hash("armor.calibrate.capture"),
    message:
        "calibrate {wildcards.model} {wildcards.calibration}"
    shell:
        """
        armor calibrate --source {input.source:q} --model {input.model:q} --settings {params.settings:q} \
            --output {output:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
