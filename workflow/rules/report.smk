"""In: every JSON file that the configuration asks for. Out: tables, figures and one page, results/report/."""


rule report:
    """The page, and its summary as CSV, JSON, Markdown and LaTeX; beside them figures/, the SVGs that results allow."""
    input:
        all_records,
    output:
        report("results/report/index.html", caption="../report/summary.rst", category="Report"),
        report("results/report/summary.csv", caption="../report/summary.rst", category="Report"),
        "results/report/summary.json",
        "results/report/summary.md",
        "results/report/summary.tex",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    conda:
        "../../envs/armor.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime="15m",
    params:
        settings=SETTINGS.report_settings().model_dump_json(exclude_none=True),  # the order of recipes is that of rows
        code=code_hash("armor.report"),
    message:
        "report"
    shell:
        """
        armor report --settings {params.settings:q} >{log:q} 2>&1
        """
