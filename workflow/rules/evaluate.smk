"""In: a model, dense or packed. Out: its perplexity, one file for each evaluation."""


rule evaluate:
    """Perplexity on blocks of text."""
    input:
        finished_model,
    output:
        "results/{model}/{recipe}/evaluation/{evaluation}.json",
    log:
        "results/logs/{model}/{recipe}/evaluation/{evaluation}.log",
    benchmark:
        "results/benchmarks/{model}/{recipe}/evaluation/{evaluation}.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=lambda wildcards: settings_json(SETTINGS.evaluations[wildcards.evaluation]),
        code=code_hash("armor.evaluate.perplexity"),
    shell:
        """
        armor evaluate --model {input:q} --settings {params.settings:q} --output {output:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
