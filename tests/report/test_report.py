"""The report: the rows are those of the JSON, a gap stays a gap, the page stands alone and is always the same."""

import csv
import dataclasses
import html
import math
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml

from armor.core.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.format.layout import Results
from armor.format.records.base import BlockSizes
from armor.format.records.benchmark import BenchmarkRecord, Continuation
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.evaluation import EvaluationRecord, TasksRecord
from armor.format.records.layer import LayerRecord
from armor.format.records.report import ReportRecord, Row, Score
from armor.format.records.serving import ServingRecord
from armor.format.records.topology import Topology
from armor.report import build, print_table
from armor.report.columns import summary_rows
from armor.report.figures import figures
from armor.report.front import offers
from armor.report.gather import read_results
from armor.report.loss_figures import heat_map
from armor.report.numbers import duration, number, percent, plus_minus, size
from armor.report.tables import csv_text, latex_text, markdown_text
from armor.report.words import missing, summarize, unrouted
from tests.report.sample import BITS, BYTES, FILES, MACHINE, PERPLEXITY, PROMPTS, change, plan, trained, write_results

LAYERS = 3
MODEL = "smollm2-135m"
THREE = ["dense", "nowag", "armor"]
FIELDS = tuple(name for name in Row.model_fields if name != "tasks")
AGAINST_DENSE = {"kl", "kl_se", "top1_agreement", "top1_agreement_se"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A complete run of five recipes and its report."""
    root = write_results(tmp_path_factory.mktemp("results"), plan(), LAYERS)
    build(root, plan(), root / "report")
    return root


@pytest.fixture
def own(tmp_path):
    """Results to break, of the recipes `THREE`."""
    return write_results(tmp_path, plan(THREE, serving=["serve"]), LAYERS)


def model_of(root, *recipes, **changes):
    return read_results(root, plan(recipes or THREE, **changes))[0]


def rows_of(root, *recipes, **changes):
    return {row.recipe: row for row in summary_rows([model_of(root, *recipes, **changes)])}


def built(root, wanted=None) -> str:
    """The page of a new report in `root`."""
    build(root, wanted or plan(THREE), root / "report")
    return page_of(root)


def page_of(root) -> str:
    return (root / "report" / "index.html").read_text()


def summary_of(root):
    return ReportRecord.read(root / "report" / "summary.json")


def evaluation_of(root, recipe, name="wikipedia"):
    return Results(str(root)).evaluation(MODEL, recipe, name)


def benchmark_of(root):
    return BenchmarkRecord.read(Results(str(root)).benchmark(MODEL, "decode"))


def change_benchmark(root, kind=BenchmarkRecord, name="decode", **changes):
    change(kind, Results(str(root)).benchmark(MODEL, name), **changes)


def without(recipe):
    """What a benchmark has of recipes without one of them, as if it had not been timed."""
    return lambda record: {name: side for name, side in record.recipes.items() if name != recipe}


def change_side(root, recipe, **changes):
    side = benchmark_of(root).recipes[recipe].model_copy(update=changes)
    change_benchmark(root, recipes=lambda record: record.recipes | {recipe: side})


def table_of(page, title):
    """The headings of a table, and of each row its texts by heading."""
    table = page.partition(f">{title}</h3>")[2].partition("</table>")[0]
    if not table:
        return {}
    (_, *headings), *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    headings, rows = map(html.unescape, headings), [map(html.unescape, row) for row in rows]
    headings = list(headings)
    return {name: dict(zip(headings, texts, strict=True)) for name, *texts in rows}


def markdown_rows(lines):
    """The cells of a Markdown table, without the line below its headings."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_csv_has_exactly_the_columns_and_says_what_the_json_says(results):
    with open(results / "report" / "summary.csv") as file:
        table = list(csv.DictReader(file))
    assert ",".join(table[0]) == (
        "model,recipe,method,pattern,block_sizes,perplexity,perplexity_se,relative_loss,bits_per_weight,"
        "compressed_share,checkpoint_bytes,factorize_seconds,decode_tokens_per_second,kl,kl_se,top1_agreement,top1_agreement_se"
    )
    assert [(row["model"], row["recipe"]) for row in table] == [(MODEL, recipe) for recipe in PERPLEXITY]
    for text, row in zip(table, summary_of(results).rows, strict=True):
        assert text == {key: "" if value is None else str(value) for key, value in row.flat().items()}


def test_rows_hold_what_the_stages_wrote(results):
    rows = {row.recipe: row for row in summary_of(results).rows}
    layers = [LayerRecord.read(Results(str(results)).layer(MODEL, "armor", k)) for k in range(LAYERS)]
    losses = [module.loss for layer in layers for module in layer.modules.values()]
    decode = benchmark_of(results)
    armor = rows["armor"]
    assert (armor.method, armor.pattern, armor.block_sizes) == ("armor", "2:4", (64,))
    assert (armor.perplexity, armor.perplexity_se) == (PERPLEXITY["armor"], PERPLEXITY["armor"] * 0.09)
    assert armor.relative_loss == pytest.approx(sum(losses) / len(losses))
    assert armor.factorize_seconds == pytest.approx(sum(layer.seconds for layer in layers))
    assert (armor.bits_per_weight, armor.checkpoint_bytes) == (BITS["armor"], BYTES["armor"])
    assert armor.decode_tokens_per_second == decode.recipes["armor"].tokens_per_second["1"].decode.median
    assert armor.compressed_share == Topology.read(Results(str(results)).topology(MODEL)).compressed_share()
    dense = rows["dense"]
    assert (dense.bits_per_weight, dense.compressed_share) == (16, None)
    assert dense.checkpoint_bytes == sum(file.bytes for file in FILES.values())
    assert dense.decode_tokens_per_second == decode.dense.tokens_per_second["1"].decode.median
    for gap in ("pattern", "block_sizes", "relative_loss", "factorize_seconds", "compressed_share", *AGAINST_DENSE):
        assert getattr(dense, gap) is None
    assert rows["nowag"].block_sizes is None


def test_the_time_and_the_loss_of_every_training_are_told(tmp_path):
    wanted = trained(plan(THREE), "armor", "refine", "tune")
    page = built(write_results(tmp_path, wanted, 4), wanted)
    stages = ("factorize", "refine", "tune")
    layers = [LayerRecord.read(Results(str(tmp_path)).layer(MODEL, "armor", k, s)) for s in stages for k in range(4)]
    assert summary_of(tmp_path).rows[2].factorize_seconds == pytest.approx(sum(layer.seconds for layer in layers))
    table = page[page.index(">Training</h3>") :].partition("</table>")[0]
    told = re.findall(r"<td[^>]*>(?:<data[^>]*>)?([^<]*)", table)
    assert {"0.625", "1 of 4 layers", "0.200", "0.100", "wiki.valid.raw"} <= {*told}


@pytest.mark.parametrize(
    "file, gaps",
    [
        ("armor/evaluation/wikipedia.json", {"perplexity", "perplexity_se"} | AGAINST_DENSE),
        ("benchmark/decode.json", {"decode_tokens_per_second"}),
        ("armor/checkpoint.json", {"bits_per_weight", "checkpoint_bytes", "compressed_share"}),
        ("armor/layers/layer_2.json", {"relative_loss", "factorize_seconds"}),
    ],
)
def test_a_missing_result_is_a_gap_and_never_zero(own, file, gaps):
    whole = rows_of(own)["armor"].flat()
    (own / MODEL / file).unlink()
    row = rows_of(own)["armor"].flat()
    assert {key for key, value in row.items() if value is None} == gaps
    assert all(row[key] == whole[key] for key in FIELDS if key not in gaps)
    text = dict(zip(FIELDS, csv_text([row]).splitlines()[1].split(","), strict=True))
    assert all(text[key] == "" for key in gaps)
    assert any(gap.startswith("armor: ") for gap in missing(model_of(own)))


def test_a_recipe_without_any_result_still_has_its_row(own):
    wanted = plan(["dense", "armor", "wanda"], evaluations=["elsewhere", "wikipedia"])
    page, rows = built(own, wanted), summary_of(own).rows
    assert [value for key, value in rows[2].flat().items() if key not in FIELDS[:4]] == [None] * len(FIELDS[4:])
    assert rows[1].perplexity is None  # of the first evaluation, which nobody ran
    gaps = "dense: evaluation elsewhere; armor: evaluation elsewhere; wanda: evaluation elsewhere, evaluation wikipedia"
    assert f"Missing, and left as gaps: {gaps}, benchmark decode, checkpoint, some decoder layers." in page


def test_no_result_at_all_is_an_error(tmp_path):
    with pytest.raises(ArmorError, match="holds no result"):
        build(tmp_path, plan(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_record_of_something_else_is_one_error(own):
    path = own / MODEL / "armor/layers/layer_0.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != "modules"})
    with pytest.raises(ArmorError, match=f"{path}: modules: is missing"):
        rows_of(own)


def test_the_report_names_every_record_and_setting_that_it_is_made_of(tmp_path):
    wanted = plan(["dense", "armor"], tasks={"reading": ["last_word"]}, serving=["serve"])
    write_results(tmp_path, wanted, LAYERS)
    records = {
        file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.json") if file.parent.name != "layers"
    }
    page, made = built(tmp_path, wanted), summary_of(tmp_path).made_by
    assert made.inputs.keys() == records - {f"{MODEL}/source.json", f"{MODEL}/model.json"}  # a checkpoint stands for it
    assert made.stage == "armor.report" and made.settings == wanted.model_dump(mode="json")
    assert f"armor: source {'a' * 16}, calibration {'b' * 16}, code {'c' * 16}, seed 0" in page


def test_the_page_gives_back_the_configuration_to_run_it_again(results):
    page = page_of(results)
    shown = html.unescape(re.search(r'aria-label="The configuration">(.*?)</pre>', page, re.DOTALL)[1])
    linked = unquote(re.search(r'href="data:text/yaml;charset=utf-8,([^"]+)"', page)[1])
    assert yaml.safe_load(shown) == yaml.safe_load(linked) == plan().config  # 2:4 stays a text
    assert list(yaml.safe_load(shown)["recipes"]) == list(PERPLEXITY)  # in their order


def test_the_page_says_what_each_stage_ran_on_once_and_offers_no_configuration_that_it_has_not(own):
    changed = {"device": "A card", "threads": 1, "versions": MACHINE.versions | {"torch": "2.14.0"}}
    file = Results(str(own)).layer(MODEL, "armor", 1)
    change(LayerRecord, file, machine=lambda record: record.machine.model_copy(update=changed))
    page = built(own, plan(THREE).model_copy(update={"config": {}}))
    assert re.findall("<li>(.*)</li>", page[page.index(">How to reproduce<") :])[:4] == [
        "calibrate, factorize, assemble, evaluate, benchmark: A processor, 2 of 2 cores",
        "factorize: A card, 1 of 2 cores",
        "calibrate, factorize, assemble, evaluate, benchmark: python 3.11.7, torch 2.13.0, transformers 5.24.0",
        "factorize: python 3.11.7, torch 2.14.0, transformers 5.24.0",
    ]
    assert "config.yaml" not in page


def test_the_same_json_gives_the_same_bytes(results, forget_drawings):
    names = ("index.html", "summary.csv", "summary.json", "summary.md", "summary.tex")
    first = [(results / "report" / name).read_bytes() for name in names]
    forget_drawings()
    build(results, plan(), results / "again")
    assert [(results / "again" / name).read_bytes() for name in names] == first


def test_the_page_loads_nothing_from_anywhere(results):
    page = page_of(results)
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<>)]+""", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, not a place
    assert not re.search(r"@import|url\((?!#)|<script[^>]|<link(?![^>]*href=\"data:,\")|<img|<iframe", page)


class Page(HTMLParser):
    """The ids of a page, every element of which is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == [] and len(self.ids) == len({*self.ids})

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_and_every_figure_has_marks_and_words(results):
    text = page_of(results)
    ids = Page(text).ids
    assert {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)} <= {*ids}
    drawn = re.findall(r"<svg([^>]*)>(.*?)</svg>", text, re.DOTALL)
    assert len(drawn) == 12 == text.count("<figcaption>")
    for attributes, inside in drawn:
        assert 'role="img"' in attributes and len(re.search('aria-label="([^"]*)"', attributes)[1]) > 30
        assert len(re.findall("<(?:path|line|text)", inside)) > 10
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())


def test_what_one_could_take_instead_is_on_the_page(results):
    found = page_of(results).partition(">What you could take instead</h3>")[2].partition('<div class="figures">')[0]
    assert found.count("<figcaption>On the front: ") == 4 == len([*results.glob("report/figures/m0-front-*.svg")])
    assert "Perplexity over speed: nowag 113.2 at 0.9225, " in found and "armor 30.96 at 0.6620" in found
    assert "At most 12 bits a weight: armor is the best, with a perplexity of 30.96 (1.36 times" in found


def test_a_recipe_is_an_offer_where_bits_and_perplexity_are_known(own):
    def offered():
        return {offer.name: offer for offer in offers(model_of(own))}

    assert list(offered()) == ["nowag", "armor", "dense"]  # by bits
    assert [offer.speed for offer in offered().values()] == [pytest.approx(r / 14.2) for r in (13.1, 9.4, 14.2)]
    change_benchmark(own, recipes=without("nowag"))
    assert offered()["nowag"].speed is None and offered()["dense"].speed == 1
    change_side(own, "armor", speedup={"4": benchmark_of(own).recipes["armor"].speedup["4"]})
    assert {choice.speed for choice in offered().values()} == {None}  # a batch is another speed
    (own / MODEL / "armor/checkpoint.json").unlink()
    assert list(offered()) == ["nowag", "dense"]
    (own / MODEL / "nowag/evaluation/wikipedia.json").unlink()
    assert list(offered()) == ["dense"]


def test_block_sizes_have_a_figure_where_three_recipes_differ_in_nothing_else(tmp_path):
    sizes = {f"armor-{size}": size for size in (8, 16, 32, 64)}
    wanted = plan(["dense", *sizes], block_sizes=sizes)
    write_results(tmp_path, wanted, LAYERS)
    change(EvaluationRecord, evaluation_of(tmp_path, "armor-8"), value=60.0)

    def drawn():
        found = figures(read_results(tmp_path, wanted)[0], "m0")
        return next((figure.svg for figure in found if figure.name == "m0-blocks"), None)

    assert "Perplexity by block size, log scale: 8 60.00, 16 30.96, 32 30.96, 64 30.96." in drawn()
    for recipe in ("armor-8", "armor-64"):  # another seed: what is left are two
        settings = {"settings": {"seed": sizes[recipe]}}
        path = Results(str(tmp_path)).checkpoint(MODEL, recipe)
        change(CheckpointRecord, path, factors=lambda r: [r.factors[0].model_copy(update=settings)])  # noqa: B023
    assert drawn() is None


def change_tasks(path, **changes):
    """Change some of the results of tasks."""
    known = TasksRecord.read(path).tasks
    changed = {task: known[task].model_copy(update=changes[task]) for task in changes}
    change(TasksRecord, path, tasks=known | changed)


def figures_of(root, **changes):
    """The figures of the report on three recipes by name."""
    return {figure.name: figure for figure in figures(model_of(root, **changes), "m0")}


def recipes_in(figure):
    """The recipes in a figure, as they stand."""
    return [text for text in re.findall(">([^<>]+)</text>", figure.svg) if text in THREE]


def test_a_task_has_a_figure_with_its_best_recipe_on_top_and_no_row_for_a_gap(tmp_path):
    tasks = {"reading": ["accuracy", "brier_loss", "mixed"]}
    write_results(tmp_path, plan(THREE, benchmarks=[], tasks=tasks), LAYERS)
    for path in tmp_path.glob(f"{MODEL}/*/evaluation/reading.json"):
        change_tasks(path, mixed={"higher_is_better": None})
    found = figures_of(tmp_path, tasks=tasks)
    accuracy, loss, mixed = (found[f"m0-task-{number}"] for number in range(3))
    assert recipes_in(accuracy) == ["dense", "armor", "nowag"]
    assert "Accuracy by recipe on accuracy: dense 55.0 ± 5.0%, armor 47.5 ± 5.0%, nowag 40.2 ± 5.0%." in accuracy.svg
    assert recipes_in(loss) == ["nowag", "armor", "dense"]  # lower is better
    assert recipes_in(mixed) == THREE  # nobody says which is better: as they stand in the plan
    (tmp_path / MODEL / "dense/evaluation/reading.json").unlink()
    assert recipes_in(figures_of(tmp_path, tasks=tasks)["m0-task-0"]) == ["armor", "nowag"]
    for recipe in ("armor", "nowag"):
        (tmp_path / MODEL / recipe / "evaluation/reading.json").unlink()
    assert "m0-task-0" not in figures_of(tmp_path, tasks=tasks)


def test_figures_of_speed_say_what_was_measured_of_each_recipe(own):
    found, names = figures_of(own), ("m0-decoding-0", "m0-linears-0")
    told = "by batch size: nowag: batch 1 0.923×, batch 4 0.923×; armor: batch 1 0.662×, batch 4 0.662×."
    assert told in found["m0-decoding-0"].svg
    shapes = ["576 × 576", "192 × 576", "1536 × 576", "576 × 1536"]
    measured = benchmark_of(own).recipes["armor"].linears
    told = ", ".join(f"{s} {number(m.speedup.median, 3)}×" for s, m in zip(shapes, measured, strict=True))
    assert f"armor: {told}" in found["m0-linears-0"].svg
    change_benchmark(own, recipes=without("nowag"))
    found = figures_of(own)
    assert all("armor" in recipes_in(found[name]) and "nowag" not in recipes_in(found[name]) for name in names)
    change_benchmark(own, recipes=without("armor"))  # no compressed recipe is left
    assert not {*names} & {*figures_of(own)}


def test_figures_are_files_of_their_own_too(own):
    """Those of the page, sized, and in colours that any program knows; none is left of an earlier report."""
    both = {"m0-front-bits", "m0-front-speed"}
    of_kl = {"m0-front-kl-bits", "m0-front-kl-speed"}  # the dense model has none, and one recipe is no figure
    for recipes, panels in ((THREE, both | of_kl), (["dense", "nowag"], both)):
        build(own, plan(recipes), own / "report")
        files = sorted((own / "report" / "figures").glob("*"))
        names = {figure.name for figure in figures(model_of(own, *recipes), "m0")}
        assert {file.stem for file in files} == names | panels and {file.suffix for file in files} == {".svg"}
        for file in files:
            root = ElementTree.fromstring(file.read_text())
            assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
            assert "var(" not in file.read_text() and 'fill="#ffffff"' in file.read_text()


def test_what_is_left_out_of_a_model_has_a_column(own):
    assert "compressed" not in print_table(list(rows_of(own).values())).splitlines()[1]
    paths = Results(str(own))
    names = tuple(linear.name for linear in Topology.read(paths.topology(MODEL)).linears())
    change(CheckpointRecord, paths.checkpoint(MODEL, "armor"), kept_dense=names[::2])
    rows = rows_of(own)
    assert 0 < rows["armor"].compressed_share < rows["nowag"].compressed_share
    heading, _, *lines = print_table(list(rows.values())).splitlines()[1:]
    assert "compressed" in heading and any(f"{rows['armor'].compressed_share:.1%}" in line for line in lines)


def test_the_summary_says_what_was_lost_and_saved(results):
    model = model_of(results, *PERPLEXITY)
    words = " ".join(summarize(model))
    assert "ARMOR (2:4, blocks of 64) has a perplexity of 30.96 ± 2.79; the dense model has 22.75 ± 2.05" in words
    assert "the best pruning method, NoWag-P (2:4), has 113.2 ± 10.2" in words
    assert "0.352 ± 0.009 nats from the dense model's (KL divergence), and at 70.1 ± 0.4% of the positions" in words
    assert "213 MB, 78% of the dense model's 273 MB" in words and "11.74 bits instead of 16" in words
    assert missing(model) == []


def test_quantization_without_pruning_is_not_called_pruning(own):
    change(EvaluationRecord, evaluation_of(own, "nowag"), value=20.0)
    wanted = plan(THREE)
    pair = wanted.pairs[1].model_copy(update={"method": "int8", "title": "int8", "pattern": "1:1"})
    changed = wanted.model_copy(update={"pairs": [wanted.pairs[0], pair, wanted.pairs[2]]})
    words = summarize(read_results(own, changed)[0])[0]
    assert "the best quantization without pruning, int8 (recipe nowag), has 20.00" in words


def test_experts_that_saw_no_token_are_named(own):
    model = model_of(own)
    assert not unrouted(model)
    experts = tuple(f"model.layers.{layer}.mlp.experts.{number}" for layer, number in ((3, 0), (3, 1), (3, 4), (4, 7)))
    name, record = next(iter(model.calibrations.items()))
    changed = dataclasses.replace(model, calibrations={name: record.model_copy(update={"unrouted_experts": experts})})
    (line,) = unrouted(changed)
    assert line.startswith(f"4 experts saw no token of the calibration {name}") and line in summarize(changed)
    assert line.endswith(": model.layers.3.mlp.experts 0 to 1, 4; model.layers.4.mlp.experts 7.")


def test_the_block_sizes_shown_are_those_used(tmp_path):
    wanted = plan(["dense", "armor"], block_sizes={"armor": 50})
    write_results(tmp_path, wanted, LAYERS)
    blocks = {"block_sizes": BlockSizes(left=32, right=48)}
    for path in tmp_path.glob(f"{MODEL}/armor/layers/*.json"):
        change(LayerRecord, path, modules=lambda r: {n: m.model_copy(update=blocks) for n, m in r.modules.items()})
    page, rows = built(tmp_path, wanted), summary_of(tmp_path).rows
    assert rows[1].block_sizes == (32, 48)
    assert re.search("^armor +32 to 48 ", print_table(rows), re.MULTILINE)
    assert "(2:4, blocks of 32 to 48)" in page and '<data value="32">32 to 48</data>' in page
    assert "armor: blocks of 50 were asked for, 32 and 48 divide the dimensions." in page


def test_the_experts_of_a_mixture_are_one_row(results):
    experts = {"k_proj": "mlp.experts.0.up_proj", "v_proj": "mlp.experts.117.up_proj"}

    def renamed(name):
        before, _, last = name.rpartition(".self_attn.")
        return f"{before}.{experts[last]}" if last in experts else name

    recipe = next(recipe for recipe in model_of(results).recipes if recipe.name == "armor")
    layers = tuple(
        layer.replace(linears=tuple(one.replace(name=renamed(one.name)) for one in layer.linears))
        for layer in recipe.topology.layers
    )
    records = [r.replace(modules={renamed(n): one for n, one in r.modules.items()}) for r in recipe.layers]
    topology, stages = recipe.topology.replace(layers=layers), [("factorize", records)]
    mixture = dataclasses.replace(recipe, topology=topology, stages=stages)
    assert mixture.larger_than_dense() == ["mlp.experts.*.up_proj"]
    assert mixture.bits()["mlp.experts.*.up_proj"] == recipe.bits()["self_attn.k_proj"]
    assert heat_map(mixture, "heat").caption.endswith("Of experts it is the mean.")


def test_linears_that_their_blocks_make_larger_are_named(results):
    page = page_of(results)
    assert "armor: the blocks make self_attn.k_proj, self_attn.v_proj larger than dense" in page
    table = page[page.index(">Bits per weight by linear</h3>") :]
    assert re.findall(r">([\d.]+!?)</td>", table[: table.index("</table>")])[-7:] == [
        *("12.56", "16.11!", "16.11!", "12.56", "11.44", "11.44", "11.44")
    ]


def test_ratios_have_the_error_of_paired_blocks(own):
    means = EvaluationRecord.read(evaluation_of(own, "dense")).block_means
    change(EvaluationRecord, evaluation_of(own, "armor"), block_means=[mean + math.log(1.5) for mean in means])
    assert "1.36 ± 0.00 times the dense model's" in summarize(model_of(own))[0]


def test_recipes_measured_differently_are_not_called_comparable(own):
    change(EvaluationRecord, evaluation_of(own, "nowag"), blocks=8)
    assert "compare with care" in " ".join(summarize(model_of(own)))


def test_recipes_are_compared_on_the_same_text_and_tasks_alone(tmp_path):
    wanted = plan(["dense", "armor", "nowag"], evaluations=["wiki", "c4"], tasks={"long": ["last_word"]})
    other = {"evaluations": ["c4"], "tasks": {"short": ["last_word"]}}
    pairs = [*wanted.pairs[:2], wanted.pairs[2].model_copy(update=other)]
    wanted = wanted.model_copy(update={"pairs": pairs})
    write_results(tmp_path, wanted, LAYERS)
    (model,) = read_results(tmp_path, wanted)
    assert model.best(blocks=True).name == "armor" and model.best(blocks=False) is None
    nowag = model.recipes[2]
    assert nowag.evaluation is None and nowag.on("c4").evaluation.evaluation == "c4"
    assert model.task_names() == ["last_word", "short.last_word"] and list(nowag.task_results) == ["short.last_word"]
    assert "NoWag" not in summarize(model)[0]


def test_further_models_evaluations_and_benchmarks_get_their_own_sections(tmp_path):
    wanted = plan(["dense", "armor-a", "armor-b"], ["first", "second"], ["wiki", "c4"], ["short", "long"])
    page = built(write_results(tmp_path, wanted, LAYERS), wanted)
    rows = summary_of(tmp_path).rows
    assert [(row.model, row.recipe) for row in rows][2:4] == [("first", "armor-b"), ("second", "dense")]
    for title in ("Perplexity on wiki", "Perplexity on c4", "By text", "Memory and speed: long"):
        assert page.count(f">{title}</h3>") == 2
    assert page.count("Loss by layer and module: armor-") == 4
    assert Page(page).ids


def test_samples_stand_side_by_side_and_a_missing_one_is_a_gap(own):
    """The dense model writes too where it is no recipe, and what a model writes is no markup."""
    prompts = [f"{prompt} …" for prompt in PROMPTS]
    first, second = benchmark_of(own).samples
    texts = first.texts | {"armor": "<b>\n\n \x1b[1m_a_"}, {n: t for n, t in second.texts.items() if n != "armor"}
    change_benchmark(own, samples=[Continuation(prompt=p, texts=t) for p, t in zip(PROMPTS, texts, strict=True)])
    found = table_of(built(own, plan(["nowag", "armor"])), "What they write")
    assert list(found) == ["dense", "nowag", "armor"]
    assert [found["dense"][prompt] for prompt in prompts] == ["Paris.", "met a crow."]
    assert [found["armor"][prompt] for prompt in prompts] == ["<b> ↵ \ufffd[1m_a_", "–"]
    assert found["nowag"][prompts[1]].startswith("met a crow, ↵ nowag.")
    change_benchmark(own, samples=())
    assert table_of(built(own), "What they write") == {}


def test_memory_and_speed_stand_side_by_side_with_their_quartiles_and_with_theory(own):
    change_benchmark(own, recipes=without("nowag"))
    page, side = built(own), benchmark_of(own).recipes["armor"]
    table = table_of(page, "Memory and speed: decode")
    assert {*table["nowag"].values()} == {"–"}
    runs, core = side.tokens_per_second["4"].decode, side.core.speedup["4"].decode.median
    low, high = (number(value, 3) for value in runs.quartiles)
    expected = {
        "Decode, batch 4": f"{number(runs.median, 3)} ({low} to {high})",
        "Beside dense, 1": "0.662 ×",
        "In theory": "1.36 ×",
        "Without blocks, 4": f"{number(core, 3)} ×",
        "Memory, loaded": "280 MB",
        "At the peak": "410 MB",
    }
    assert {name: table["armor"][name] for name in expected} == expected
    assert (
        table["dense"]["In theory"] == table["dense"]["Beside dense, 1"] == table["dense"]["Without blocks, 4"] == "–"
    )
    shapes = ["576 × 576", "192 × 576", "1536 × 576", "576 × 1536"]
    linears = table_of(page, "Speed by linear: decode")
    assert [name.replace("\xa0", " ") for name in linears] == [f"armor, {shape}, 2:4, blocks 64" for shape in shapes]
    for shape, measured in zip(linears.values(), side.linears, strict=True):
        assert shape["Packed, ms"].startswith(f"{number(measured.milliseconds.median, 3)} (")
        assert shape["Without blocks, ms"].startswith(f"{number(measured.core_milliseconds.median, 3)} (")
    gaps = {"core_milliseconds": None, "core_speedup": None}
    change_side(own, "armor", core=None, linears=tuple(shape.model_copy(update=gaps) for shape in side.linears))
    page = built(own)
    assert table_of(page, "Memory and speed: decode")["armor"]["Without blocks, 1"] == "–"
    assert {row["Without blocks, ms"] for row in table_of(page, "Speed by linear: decode").values()} == {"–"}
    assert table_of(built(own, plan(["dense"])), "Speed by linear: decode") == {}


def test_the_table_and_the_figure_of_a_server_have_speeds_by_clients(own):
    wanted, path = plan(THREE, serving=["serve"]), Results(str(own)).benchmark(MODEL, "serve")
    page, record = built(own, wanted), ServingRecord.read(path)
    table, load = table_of(page, "Served by vLLM: serve"), record.recipes["armor"].clients["16"]
    assert list(table)[:4] == ["dense, 1 client", "dense, 4 clients", "dense, 16 clients", "nowag, 1 client"]
    low, high = (number(value, 3) for value in load.tokens_per_second.quartiles)
    row = table["armor, 16 clients"]
    assert row["Tokens/s"] == f"{number(load.tokens_per_second.median, 3)} ({low} to {high})"
    assert row["Beside dense"] == "0.662 ×" and table["dense, 16 clients"]["Beside dense"] == "–"
    assert row["First token, ms"].startswith(f"{number(load.first_token_milliseconds.median, 3)} (")
    assert row["Memory"] == size(record.recipes["armor"].memory_bytes.median)
    svg = next(f.svg for f in figures(read_results(own, wanted)[0], "m0") if f.name == "m0-throughput-0")
    for name, side in {"dense": record.dense, **record.recipes}.items():
        told = [f"{n} {number(side.clients[n].tokens_per_second.median, 3)}" for n in ("1", "4", "16")]
        assert f"{name}: {', '.join(told)}" in svg
    change_benchmark(own, ServingRecord, "serve", recipes=without("nowag"))
    page = built(own, wanted)
    assert not [name for name in table_of(page, "Served by vLLM: serve") if name.startswith("nowag")]
    assert "nowag: benchmark serve." in page
    os.unlink(path)
    page = built(own, wanted)
    assert "Served by vLLM" not in page and "armor: benchmark serve." in page


def test_recipes_that_did_not_fit_together_are_named_by_their_turns(own):
    for turns, told in (((("nowag", "armor"),), False), ((("nowag",), ("armor",)), True)):
        change_benchmark(own, turns=turns)
        assert ("those that took turns with the dense model are nowag; armor." in built(own)) is told


def test_the_terminal_table_fits_and_marks_the_best(results):
    text = print_table(summary_of(results).rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == f"{MODEL}, 2:4"
    armor = next(line for line in lines if line.startswith("armor"))
    assert re.search(r" \*30\.96 ± 2\.79 +\*0\.352 +\*70\.1% ", armor) and " 213 MB " in armor


def test_markdown_has_a_row_per_recipe_with_errors_gaps_and_the_best_in_bold(results):
    headings, *rows = markdown_rows((results / "report" / "summary.md").read_text().splitlines())
    assert headings == [
        *(
            "recipe",
            "block",
            "perplexity",
            "KL",
            "same top",
            "rel. loss",
            "bits/weight",
            "size",
            "factorize",
            "tokens/s",
        )
    ]
    assert [row[0] for row in rows] == list(PERPLEXITY)
    dense, armor = rows[0], rows[4]
    assert dense[2] == "22.75 ± 2.05" and dense[1] == dense[3] == dense[4] == "–"
    assert armor[1:5] == ["64", "**30.96 ± 2.79**", "**0.352 ± 0.009**", "**70.1 ± 0.4%**"]
    assert [row[6] for row in rows] == ["16.00", "**9.00**", "**9.00**", "**9.00**", "11.74"]


def test_latex_is_a_table_of_booktabs_that_says_the_same_as_markdown(results):
    text = (results / "report" / "summary.tex").read_text()
    assert all(text.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"))
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r"\\")]
    plain = [
        re.sub(r"\\textbf\{([^}]*)\}", r"**\1**", line).replace(r"$\pm$", "±").replace("--", "–").replace(r"\%", "%")
        for line in lines
    ]
    expected = markdown_rows((results / "report" / "summary.md").read_text().splitlines())
    assert [[cell.strip() for cell in line.split(" & ")] for line in plain] == expected
    assert text.isascii()


def test_of_several_texts_each_has_perplexity_kl_and_agreement_the_best_of_each_in_bold(tmp_path):
    wanted = plan(["dense", "wanda", "nowag", "armor"], evaluations=["wiki", "c4"])
    write_results(tmp_path, wanted, LAYERS)
    for recipe, value in (("nowag", 31.5001), ("armor", 31.5)):  # the same to a reader
        change(EvaluationRecord, evaluation_of(tmp_path, recipe, "c4"), value=value, standard_error=1.25)
    (tmp_path / MODEL / "nowag" / "evaluation" / "wiki.json").unlink()
    assert "31.50 ± 1.25" in built(tmp_path, wanted)
    text = (tmp_path / "report" / "summary.md").read_text()
    headings, dense, wanda, nowag, armor = markdown_rows(text[text.index("by text") :].splitlines())
    assert headings == ["recipe", *(f"{text}{end}" for text in ("wiki", "c4") for end in ("", ": KL", ": same top"))]
    assert dense[2:4] == ["–", "–"] and nowag[1:4] == ["–", "–", "–"]
    assert nowag[4] == armor[4] == "**31.50 ± 1.25**" and all("**" in cell for cell in (*armor[1:4], *armor[5:]))
    assert "**" not in "".join(wanda + dense)
    assert (tmp_path / "report" / "summary.tex").read_text().count("toprule") == 2


def test_names_are_escaped_in_markdown_and_latex():
    rows = [
        Row(
            model="a_b",
            recipe=recipe,
            method="nowag",
            pattern="2:4",
            tasks=[Score(task="x_|y", value=value, standard_error=error, higher_is_better=True)],
        )
        for recipe, value, error in (("nowag_1", 0.5, 0.01), ("other_1", 0.25, None))
    ]
    text = markdown_text(rows)
    assert r"## a\_b, 2:4" in text and r"| nowag\_1 " in text and r" x\_\|y |" in text and " **50.0 ± 1.0%** |" in text
    text = latex_text(rows)
    assert r"\caption{a\_b, 2:4}" in text and r"nowag\_1 & NoWag-P & -- &" in text and r"x\_|y" in text
    assert r"\textbf{50.0 $\pm$ 1.0\%} \\" in text and r"25.0\% \\" in text


def test_numbers_are_written_for_people():
    assert [number(value) for value in (22.7512, 1179.3, 9.99996, 0, None)] == ["22.75", "1,179", "10.00", "0", "–"]
    assert number(0.013461, 3) == "0.0135"
    assert (plus_minus(113.21, 12.44), plus_minus(5.12, None)) == ("113.2 ± 12.4", "5.120")
    assert (percent(0.7012), percent(0.7012, 0.0041)) == ("70.1%", "70.1 ± 0.4%")
    assert [size(value) for value in (444_100, 269_060_552, 141 * 10**9)] == ["444 kB", "269 MB", "141 GB"]
    assert [duration(value) for value in (75.3, 403, 9000)] == ["75 s", "6.7 min", "2.5 h"]


def test_tasks_have_their_columns_and_a_missing_result_is_a_gap(tmp_path):
    tasks = {"reading": ["last_word", "continuation"], "more": ["last_word"]}
    wanted = plan(["dense", "armor", "nowag"], tasks=tasks)
    write_results(tmp_path, wanted, LAYERS)
    (tmp_path / MODEL / "armor" / "evaluation" / "more.json").unlink()
    page, rows = built(tmp_path, wanted), summary_of(tmp_path).rows
    names = ["last_word", "continuation", "more.last_word"]
    assert list(rows[0].flat())[len(FIELDS) :] == [f"{name}{end}" for name in names for end in ("", "_se")]
    assert [rows[1].score(name).value for name in names] == [pytest.approx(0.47525), pytest.approx(0.47525), None]
    assert (tmp_path / "report" / "summary.csv").read_text().splitlines()[2].endswith(",,")
    assert "armor: tasks more" in page
    text = print_table(rows)
    assert re.search(r"^armor +\*47.5 ± 5.0% +\*47.5 ± 5.0% +–$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 110


def test_the_best_of_a_task_is_what_its_metric_says(tmp_path):
    names = ["accuracy", "brier_loss", "mixed"]
    wanted = plan(["dense", "armor", "nowag"], tasks={"questions": names})
    write_results(tmp_path, wanted, LAYERS)
    for path in tmp_path.glob(f"{MODEL}/*/evaluation/questions.json"):
        change_tasks(path, mixed={"higher_is_better": None})
    page = built(tmp_path, wanted)
    best = ["47.5 ± 5.0%", "40.2 ± 5.0%"]  # the highest, the lowest, none
    table = page.partition(">Accuracy on tasks</h3>")[2].partition("</div>\n</div>")[0]
    assert re.findall('best" >([^<]+)<', table) == best
    headings, *rows = markdown_rows((tmp_path / "report" / "summary.md").read_text().splitlines())
    found = [[row[place] for row in rows if row[place].startswith("**")] for place in range(-3, 0)]
    assert [name.replace("\\", "") for name in headings[-3:]] == names
    assert found == [[f"**{best[0]}**"], [f"**{best[1]}**"], []]
