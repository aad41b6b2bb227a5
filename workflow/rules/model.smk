"""In: a model's source in the configuration. Out: source.json (where its files are, and their hashes), model.json."""


rule fetch:
    """Bring the model here as a Hugging Face folder with safetensors."""
    output:
        "results/{model}/source.json",
    log:
        "results/logs/{model}/fetch.log",
    benchmark:
        "results/benchmarks/{model}/fetch.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime="4h",
    params:
        settings=lambda wildcards: settings_json(SETTINGS.models[wildcards.model]),
        code=code_hash("armor.model.source"),
    message:
        "fetch {wildcards.model}"
    shell:
        """
        armor fetch --settings {params.settings:q} --output {output:q} --threads {threads} >{log:q} 2>&1
        """


checkpoint inspect:
    """Find the decoder layers and their linears; a checkpoint, since the number of layers decides how many jobs follow."""
    input:
        "results/{model}/source.json",
    output:
        "results/{model}/model.json",
    log:
        "results/logs/{model}/inspect.log",
    benchmark:
        "results/benchmarks/{model}/inspect.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime="15m",
    params:
        code=code_hash("armor.model.inspect"),
    message:
        "inspect {wildcards.model}"
    shell:
        """
        armor inspect --source {input:q} --output {output:q} >{log:q} 2>&1
        """
