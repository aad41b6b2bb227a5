"""In: a model's source in the configuration. Out: source.json (where its files are, and their hashes), model.json."""


rule fetch:
    """Bring the model here as a Hugging Face folder with safetensors."""
    output:
        record=R.source(),
    log:
        R.log("fetch", "{model}"),
    benchmark:
        R.measured("fetch", "{model}")
    wildcard_constraints:
        model=any_of(name for name in SETTINGS.models if not (STORED and name in MADE)),
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
        armor fetch --settings {params.settings:q} --output {output.record:q} --threads {threads} >{log:q} 2>&1
        """


if STORED and MADE:

    use rule fetch as fetch_made with:
        output:
            record=R.source(),
            more=directory(str(beside(R.source()))),
        wildcard_constraints:
            model=any_of(MADE),


checkpoint inspect:
    """Find the decoder layers and their linears; a checkpoint, since the number of layers decides how many jobs follow."""
    input:
        source=R.source(),
        more=stored_for("inspect"),
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
        armor inspect --source {input.source:q} --output {output:q} >{log:q} 2>&1
        """
