"""Sub-commands for people: check a configuration, follow a run, ask why, look at a checkpoint, take it elsewhere."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from armor.command.common import Threads, app, folder_of, prepare
from armor.config import reference
from armor.config.loading import load_config, missing_paths
from armor.config.measures import BUILT_TASKS
from armor.config.tasks import asked_tasks
from armor.core.errors import ArmorError
from armor.execution import devices
from armor.execution.table import text_table
from armor.format import layout
from armor.format.records.report import ReportRecord
from armor.plan.machine import USUAL
from armor.run.status import read_status
from armor.serve.engine import check_asked


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Configuration files; later ones override.")]) -> None:
    """Check a configuration without running anything, and say what it asks for."""
    checked = load_config(*files)
    names = " ".join(map(str, files))
    if missing := missing_paths(checked):
        for line in missing:
            print(f"armor: error: {names}: {line}", file=sys.stderr)
        raise typer.Exit(1)
    if tasks := {task for asked in checked.evaluations.values() for task, _ in asked_tasks(asked).values()}:
        from armor.evaluate.tasks import check_names

        try:
            check_names(sorted(tasks - {*BUILT_TASKS}))
        except ArmorError as error:
            raise ArmorError(f"{names}: evaluations: {error}") from None
    try:
        check_asked(checked.served())
    except ArmorError as error:
        raise ArmorError(f"{names}: {error}") from None
    pairs = checked.pairs().values()
    counts = (
        _count(len(pairs), "pair of model and recipe", "pairs of model and recipe"),
        _count(sum(len(asked.texts) + len(asked.tasks) for asked in pairs), "evaluation", "evaluations"),
        _count(sum(len(asked.benchmarks) + len(asked.serving) for asked in pairs), "benchmark", "benchmarks"),
    )
    print(f"{names}: {', '.join(counts)}")


@app.command()
def init(
    model: Annotated[str, typer.Option(prompt=True, help="A name on the hub, a folder, or a GGUF file.")],
    output: Annotated[Path, typer.Option(help="The file to write; it must be new.")] = Path("my.yaml"),
    threads: Threads = None,
) -> None:
    """Write a configuration for a model that this machine can run, and say what to type next."""
    if output.exists():
        raise ArmorError(f"{output}: is there already; choose another name with --output")
    prepare(threads)
    from armor.plan.start import first_configuration

    text = first_configuration(model, Path())
    output.write_text(text, encoding="utf-8")
    gpus = len(devices.list_devices())
    print(f"{output} is written. What it will take, and then the run:")
    print(f"  armor plan {shlex.quote(str(output))}")
    on_gpus, written = f" --resources gpu={gpus}" if gpus else "", shlex.quote(str(output))
    print(f"  snakemake --cores {os.cpu_count()}{on_gpus}{_snakefile()} --configfile {written}")


def _snakefile() -> str:
    """The option that names the workflow, where Snakemake does not find it in this folder but beside this package."""
    own = Path(__file__).parents[2] / "Snakefile"
    here = any(Path(name).is_file() for name in ("Snakefile", "workflow/Snakefile"))
    return "" if here or not own.is_file() else f" --snakefile {shlex.quote(str(own))}"


@app.command()
def plan(
    files: Annotated[list[Path], typer.Argument(help="Configuration files; later ones override.")],
    card: Annotated[str, typer.Option(help="The GPU to plan for; an unknown name lists all.")] = USUAL,
    directory: Annotated[Path, typer.Option(help="The folder that the run will have with --directory.")] = Path(),
    measure: Annotated[bool, typer.Option(help="Time a layer here, and say how long the run will take.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="A profile of Snakemake: say too what the jobs ask of its cluster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    threads: Threads = None,
) -> None:
    """Say what a run will take, from headers alone: jobs, memory, disk, sizes, speed, time; what will not fit."""
    prepare(threads or os.cpu_count())
    from armor.plan.run import make_plan

    found, lines = make_plan(files, card, directory, measure, profile)
    print(found.model_dump_json(indent=1) if as_json else "\n".join(lines))
    for problem in found.problems:
        print(f"armor: error: {problem}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(1)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


@app.command()
def status(
    results: Annotated[Path, typer.Argument(help="The folder with all results, or the run's.")] = Path(layout.RESULTS),
    configuration: Annotated[
        Path | None, typer.Option("--config", help="A configuration file; unset: that of the last run.")
    ] = None,
) -> None:
    """Say what is done, running, failed or missing, while a run goes on or after it, and what is out of date."""
    from armor.run.explain import Reruns

    config = configuration and load_config(configuration)
    found = read_status(results, config)
    print(found.table(), *found.details(), sep="\n")
    reruns = Reruns(found.results, config)
    if again := sum(bool(reruns.reasons(job)) for job, state in found.states.items() if state == "done"):
        said = f" --config {configuration}" if configuration else ""
        page = layout.Results(str(found.results)).report()[0]
        print(f"{again} of those that are done would run again: armor explain {page}{said}")


@app.command(context_settings={"ignore_unknown_options": True})
def progress(
    command: Annotated[list[str], typer.Argument(metavar="-- snakemake ...", help="Snakemake and its arguments.")],
) -> None:
    """Run Snakemake and, on a terminal, show one line with the time left; elsewhere a line for each job, as ever."""
    from armor.run.progress import follow

    raise typer.Exit(follow(command))


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="Factors, statistics, a checkpoint, an evaluation, the report.")],
    configuration: Annotated[
        Path | None, typer.Option("--config", help="A configuration file; unset: that of the last run.")
    ] = None,
) -> None:
    """Say what made a result, and whether and why it would run again now."""
    from armor.run.explain import Reruns, describe, newer_versions, record_of, results_of

    record = record_of(file)
    print(*describe(record), sep="\n")
    for line in newer_versions(record):
        print(f"other version: {line} (it does not run again for that)")
    results = results_of(record)
    if results is None:
        print("It lies in no results folder of a run, so nothing can make it run again.")
        return
    reruns = Reruns(results, configuration and load_config(configuration))
    job = reruns.job_of(record)
    if job is None:
        print("The configuration asks for nothing such, so it would not run again.")
    elif reasons := reruns.reasons(job):
        print(f"{job} would run again:", *reasons, sep="\n  ")
    else:
        print(f"{job} is up to date.")
    if counts := reruns.counts():
        stages = ", ".join(stage if count == 1 else f"{stage} {count}" for stage, count in counts.items())
        print(f"of the whole run would run again: {stages}")


@app.command()
def summary(report: Annotated[Path, typer.Argument(help="The report's folder, or the run's.")] = Path(".")) -> None:
    """Print the report's table, and where the page is."""
    from armor.report.tables import print_table

    places = (report, report / layout.REPORT, report / layout.RESULTS / layout.REPORT)
    report = next((place for place in places if (place / layout.SUMMARY).is_file()), places[-1])
    print(print_table(ReportRecord.read(report / layout.SUMMARY).rows))
    print(f"The report: {report / layout.PAGE}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    against: Annotated[Path | None, typer.Option(help="The source (source.json, or its folder) to compare to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    threads: Threads = None,
) -> None:
    """Check a packed checkpoint: files, hashes, shapes, dtypes, patterns, numbers; beside its source, its errors."""
    prepare(threads)
    from armor.assemble.verify import table, verify

    found = verify(folder, against and folder_of(against))
    print(found.model_dump_json(indent=1, exclude_none=True) if as_json else table(found))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Unset: the checkpoint's own.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Multiply a packed checkpoint out to a plain dense model, which loads without armor."""
    prepare(threads)
    from armor.assemble.export import export

    done = export(folder, output, dtype)
    print(f"{output}: {done.tensors} tensors, {done.multiplied_out} multiplied out, {done.bytes / 1e6:,.1f} MB")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call it; unset: the folder.")] = None,
) -> None:
    """Serve a packed checkpoint by OpenAI's interface: by vLLM, which takes all other options, or by transformers."""
    from armor.serve.server import serve

    serve(folder, served_model_name or str(folder), host, port, context.args)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    against: Annotated[
        Path | None, typer.Option(help="A dense model (source.json, or its folder) to answer beside it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    threads: Threads = None,
) -> None:
    """Talk to a packed checkpoint in the terminal, greedily; an empty input (Ctrl-D) ends it."""
    prepare(threads)
    from armor.serve.chat import Speaker, chat

    speakers = [Speaker.of("dense", folder_of(against))] if against else []
    speakers.append(Speaker.of("compressed", folder_of(folder)))
    if sys.stdin.isatty():
        print("Ask, and end with Ctrl-D.")
    chat(speakers, sys.stdin, max_tokens)


@app.command("devices")
def list_devices() -> None:
    """List the GPUs that jobs may lease, their memory, and who holds them."""
    found = devices.list_devices()
    if not found:
        print("no CUDA device is visible: jobs compute on the CPU")
    rows = []
    for device in found:
        used, total = device.used_bytes, device.memory_bytes
        memory = "memory unknown"
        if used is not None and total is not None:
            memory = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB used"
        rows.append((device.name, device.model or "unknown card", memory, device.holder or "free"))
    if rows:
        print(text_table(rows, align="llll"))


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print every key of the configuration, and the methods.")
    ] = False,
    methods: Annotated[bool, typer.Option("--methods", help="Print a short table of the methods.")] = False,
    records: Annotated[bool, typer.Option("--records", help="Print what lies in results/, file by file.")] = False,
    write: Annotated[
        list[Path] | None, typer.Option(help="Make the generated parts of this page anew; may be given again.")
    ] = None,
) -> None:
    """Print the JSON schema of the configuration, or what people read instead, as Markdown."""
    asked = {"--markdown": markdown, "--methods": methods, "--records": records}
    for page in write or ():
        page.write_text(reference.fresh(page.read_text(encoding="utf-8"), str(page)), encoding="utf-8")
    for option in (option for option, given in asked.items() if given):
        print(reference.PARTS[f"armor schema {option}"]())
    if not write and not any(asked.values()):
        print(reference.json_schema(), end="")
