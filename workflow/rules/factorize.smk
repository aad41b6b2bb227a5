"""In: one decoder layer's weights and statistics. Out: its factors, and what is known of them (losses, seconds)."""


rule factorize:
    """Compress the linears of one decoder layer: one job, one device."""
    input:
        source="results/{model}/source.json",
        model="results/{model}/model.json",
        calibration=lambda wildcards: "results/{model}/calibration/{calibration}/calibration.json".format(
            model=wildcards.model, calibration=SETTINGS.calibration_of(wildcards.recipe)
        ),
    output:
        factors="results/{model}/{recipe}/layers/layer_{layer}.safetensors",
        record="results/{model}/{recipe}/layers/layer_{layer}.json",
    log:
        "results/logs/{model}/{recipe}/layer_{layer}.log",
    benchmark:
        "results/benchmarks/{model}/{recipe}/layer_{layer}.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="4h",
    params:
        settings=lambda wildcards: settings_json(SETTINGS.layer_settings(wildcards.recipe, int(wildcards.layer))),
        code=code_hash("armor.factorize.layer"),
    message:
        "factorize {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor factorize --source {input.source:q} --model {input.model:q} --calibration {input.calibration:q} \
            --layer {wildcards.layer} --settings {params.settings:q} --output {output.factors:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
