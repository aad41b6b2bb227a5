"""In: the factors of every decoder layer. Out: checkpoint/, which transformers loads, and the record about it."""


rule assemble:
    """Put the factors and the untouched tensors together, shard by shard."""
    input:
        source=R.source(),
        topology=R.topology(),
        factors=needed("assemble", "factors"),
        refined=ancient(summed_up(behind=False)),
        behind=summed_up(behind=True),
        more=stored_for("assemble"),
    output:
        record=R.checkpoint(),
        more=stored("assemble", "model", "recipe"),
    log:
        R.log("assemble", "{model}", "{recipe}"),
    benchmark:
        R.measured("assemble", "{model}", "{recipe}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=16000,
        runtime="4h",
    params:
        factors=folder_needed("assemble"),
        code=code("assemble"),
    message:
        "assemble {wildcards.model} {wildcards.recipe}"
    shell:
        """
        armor assemble --source {input.source:q} --topology {input.topology:q} --factors {params.factors:q} \
            --output {output.record:q} >{log:q} 2>&1
        """
