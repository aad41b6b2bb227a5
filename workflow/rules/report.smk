"""In: every JSON file that the configuration asks for. Out: tables, figures and one page, results/report/."""


rule report:
    """The page, and its summary as CSV, JSON, Markdown and LaTeX; beside them figures/, the SVGs that results allow."""
    input:
        all_records,
        more=stored_for("report", by="tasks"),
    output:
        [report(file, caption="../report/summary.rst", category="Report") for file in R.report()[:2]],
        R.report()[2:],
    log:
        R.log("report"),
    benchmark:
        R.measured("report")
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime="15m",
    params:
        settings=settings("report"),
        results=lambda wildcards: HERE.root,
        code=code("report"),
    message:
        "report"
    shell:
        """
        armor report --settings {params.settings:q} --results {params.results:q} >{log:q} 2>&1
        """
