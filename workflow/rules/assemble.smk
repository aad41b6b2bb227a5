"""In: the factors of every decoder layer. Out: checkpoint/, which transformers loads, and checkpoint.json about it."""


rule assemble:
    """Put the factors and the untouched tensors together, shard by shard."""
    input:
        source="results/{model}/source.json",
        model="results/{model}/model.json",
        factors=lambda wildcards: factors_of(wildcards.model, wildcards.recipe, "safetensors"),
    output:
        "results/{model}/{recipe}/checkpoint.json",
    log:
        "results/logs/{model}/{recipe}/assemble.log",
    benchmark:
        "results/benchmarks/{model}/{recipe}/assemble.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=16000,
        runtime="4h",
    params:
        factors=lambda wildcards: f"results/{wildcards.model}/{wildcards.recipe}/layers",
        code=code_hash("armor.assemble.writer"),
    message:
        "assemble {wildcards.model} {wildcards.recipe}"
    shell:
        """
        armor assemble --source {input.source:q} --model {input.model:q} --factors {params.factors:q} \
            --output {output:q} >{log:q} 2>&1
        """
