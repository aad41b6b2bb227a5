"""In: a model's source in the configuration. Out: source.json (where its files are, and their hashes), model.json."""


rule fetch:
    """Bring the model here as a Hugging Face folder with safetensors."""
    output:
        R.source(),
    log:
        R.log("fetch", "{model}"),
    benchmark:
        R.measured("fetch", "{model}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime="4h",
    params:
        settings=settings("fetch"),
        code=code("fetch"),
    message:
        "fetch {wildcards.model}"
    shell:
        """
        armor fetch --settings {params.settings:q} --output {output:q} --threads {threads} >{log:q} 2>&1
        """


checkpoint inspect:
    """Find the decoder layers and their linears; a checkpoint, since the number of layers decides how many jobs follow."""
    input:
        R.source(),
    output:
        R.topology(),
    log:
        R.log("inspect", "{model}"),
    benchmark:
        R.measured("inspect", "{model}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime="15m",
    params:
        code=code("inspect"),
    message:
        "inspect {wildcards.model}"
    shell:
        """
        armor inspect --source {input:q} --output {output:q} >{log:q} 2>&1
        """
