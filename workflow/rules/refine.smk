"""Optional. In: factors, and what the dense model makes of a text. Out: the same factors, trained to be closer to it."""


rule states:
    """Run the text through the dense model, and keep what goes into every decoder layer while layers are refined.

    Nothing makes it run but a layer that needs it: its settings and its code are those of `refine` too. If Snakemake saw
    them change here, it would not ask the layers behind whether they have changed, for it expects them to run; and would
    then pass over them, since to them the states are ancient. They are so only while the record is there. So it stays
    until the job itself replaces it: else one that fails would make all layers run again, also those that are not due.
    Stale ones that a run left are the exception (`again_if_left`).
    """
    input:
        source=R.source(),
        topology=R.topology(),
        more=stored_for("states"),
    output:
        record=R.states() if STORED else update(R.states()),
        folder=temp(directory(str(beside(R.states())))),
    log:
        R.log("states", "{model}", "{states}"),
    benchmark:
        R.measured("states", "{model}", "{states}")
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=lambda wildcards, input: settings("states")(wildcards),
    message:
        "states {wildcards.model} {wildcards.states}"
    shell:
        """
        armor states --source {input.source:q} --topology {input.topology:q} --settings {params.settings:q} \
            --output {output.record:q} --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule refine:
    """Train one decoder layer until its output is close to the dense one's: one job, one device."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("refine", "calibration"),
        factors=needed("refine", "factors"),
        before=needed("refine", "before"),
        states=states_for,  # `refined` holds their folder
        more=ancient(stored_for("refine")),
    output:
        factors=R.factors(stage="refine"),
        record=R.layer(stage="refine"),
    log:
        R.log("refine", "{model}", "{recipe}", "{layer}"),
    benchmark:
        R.measured("refine", "{model}", "{recipe}", "{layer}")
    conda:
        "../../envs/armor.yaml"
    threads: lambda wildcards: 8 if is_chained(wildcards) else 1  # alone in its turn, or beside other layers
    resources:
        gpu=1,
        mem_mb=24000,
        runtime="8h",
    params:
        settings=settings("refine"),
        factors=folder_needed("refine"),
        code=code("refine"),
        text=text("refine"),
    message:
        "refine {wildcards.model} {wildcards.recipe} layer {wildcards.layer}"
    shell:
        """
        armor refine --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --factors {params.factors:q} --states {input.states:q} --layer {wildcards.layer} \
            --settings {params.settings:q} --output {output.factors:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """


rule refined:
    """Sum up a recipe's refinement. It holds the states until all layers are done: Snakemake deletes them then.

    Only its layers make it run. If states that lie there did, jobs behind it that are due would be passed over.
    """
    input:
        states=ancient(lambda wildcards: str(beside(R.states(*states_behind(*wildcards))))),
        factors=needed("refined", "factors"),
        more=stored_for("refined"),
    output:
        R.refined(),
    log:
        R.log("refined", "{model}", "{recipe}"),
    benchmark:
        R.measured("refined", "{model}", "{recipe}")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime="15m",
    params:
        factors=folder_needed("refined"),
        code=code("refined"),
    message:
        "refined {wildcards.model} {wildcards.recipe}"
    shell:
        """
        armor refined --factors {params.factors:q} --output {output:q} >{log:q} 2>&1
        """


rule tune:
    """Train the whole model until its predictions are close to the dense one's; one job, all layers."""
    input:
        source=R.source(),
        topology=R.topology(),
        calibration=needed("tune", "calibration"),
        factors=needed("tune", "factors"),
        more=stored_for("tune"),
    output:
        record=R.tuned(),
        more=stored("tune", "model", "recipe"),
    log:
        R.log("tune", "{model}", "{recipe}"),
    benchmark:
        R.measured("tune", "{model}", "{recipe}")
    conda:
        "../../envs/armor.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=64000,
        runtime="24h",
    params:
        settings=settings("tune"),
        factors=folder_needed("tune"),
        code=code("tune"),
        text=text("tune"),
    message:
        "tune {wildcards.model} {wildcards.recipe}"
    shell:
        """
        armor tune --source {input.source:q} --topology {input.topology:q} --calibration {input.calibration:q} \
            --factors {params.factors:q} --settings {params.settings:q} --output {output.record:q} \
            --threads {threads} --gpus {resources.gpu} >{log:q} 2>&1
        """
