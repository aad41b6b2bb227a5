"""Optional. In: the dense model, a text, a budget of bits. Out: how each linear is compressed, which you may edit."""


rule sensitivity:
    """Measure how the dense model's predictions depend on each linear, one decoder layer in memory at a time."""
    input:
        source=R.source(),
        topology=R.topology(),
        more=stored_for("sensitivity"),
    output:
        record=R.sensitivity(),
        more=stored("sensitivity", "model", "sensitivity"),
    log:
        R.log("sensitivity", "{model}", "{sensitivity}"),
    benchmark:
        R.measured("sensitivity", "{model}", "{sensitivity}")
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=settings("sensitivity"),
        code=code("sensitivity"),
        text=text("sensitivity"),
    message:
        "sensitivity {wildcards.model} {wildcards.sensitivity}"
    shell:
        """
        armor sensitivity --source {input.source:q} --topology {input.topology:q} --settings {params.settings:q} \
            --output {output.record:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule price:
    """Try every choice for the linears of one decoder layer: its bits, and its predicted cost; one job, one device."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("price", "calibration"),
        sensitivity=needed("price", "sensitivity"),
        more=stored_for("price"),
    output:
        R.prices(),
    log:
        R.log("price", "{model}", "{recipe}", "{layer}"),
    benchmark:
        R.measured("price", "{model}", "{recipe}", "{layer}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="4h",
    params:
        settings=settings("price"),
        code=code("price"),
    message:
        "price {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor price --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --sensitivity {input.sensitivity:q} --layer {wildcards.layer} --settings {params.settings:q} \
            --output {output:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule budget:
    """Choose for each linear what costs the least in all. The layers are factorized as the file says, edited or not."""
    input:
        needed("budget", "prices"),
    output:
        R.budget(),
    log:
        R.log("budget", "{model}", "{recipe}"),
    benchmark:
        R.measured("budget", "{model}", "{recipe}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime="1h",
    params:
        settings=settings("budget"),
        prices=lambda wildcards: HERE.prices_folder(wildcards.model, wildcards.recipe),
        code=code("budget"),
    message:
        "budget {wildcards.model} {wildcards.recipe}"
    shell:
        """
        armor budget --prices {params.prices:q} --settings {params.settings:q} --output {output:q} >{log:q} 2>&1
        """
