"""The report: the rows are those of the JSON, a gap stays a gap, the page stands alone and is always the same."""

import csv
import dataclasses
import html
import importlib
import math
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml

import armor.methods
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
from armor.methods import METHODS
from armor.report import build, print_table
from armor.report.charts import beside
from armor.report.columns import COLUMNS, summary_rows
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
    """Results to break: dense, nowag and armor."""
    return write_results(tmp_path, plan(["dense", "nowag", "armor"]), LAYERS)


def model_of(root, *recipes, **changes):
    return read_results(root, plan(recipes or ["dense", "nowag", "armor"], **changes))[0]


def rows_of(root, *recipes, **changes):
    return {row.recipe: row for row in summary_rows([model_of(root, *recipes, **changes)])}


def summary_of(root):
    return ReportRecord.read(root / "report" / "summary.json").rows


def evaluation_of(root, recipe, name="wikipedia"):
    return Results(str(root)).evaluation(MODEL, recipe, name)


def benchmark_of(root):
    return BenchmarkRecord.read(Results(str(root)).benchmark(MODEL, "decode"))


def without_benchmark(root, recipe):
    """As if the recipe had not been timed."""
    left = {name: side for name, side in benchmark_of(root).recipes.items() if name != recipe}
    change(BenchmarkRecord, Results(str(root)).benchmark(MODEL, "decode"), recipes=left)


def change_side(root, recipe, **changes):
    side = benchmark_of(root).recipes[recipe].model_copy(update=changes)
    change(BenchmarkRecord, Results(str(root)).benchmark(MODEL, "decode"), recipes=lambda r: r.recipes | {recipe: side})


def page_of(root) -> str:
    return (root / "report" / "index.html").read_text()


def test_csv_has_exactly_the_columns_and_a_row_per_recipe(results):
    with open(results / "report" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "model,recipe,method,pattern,block_sizes,perplexity,perplexity_se,relative_loss,bits_per_weight,"
        "compressed_share,checkpoint_bytes,factorize_seconds,decode_tokens_per_second,kl,kl_se,top1_agreement,top1_agreement_se"
    )
    assert [row["recipe"] for row in rows] == list(PERPLEXITY)
    assert {row["model"] for row in rows} == {MODEL}


def test_csv_and_json_say_the_same(results):
    with open(results / "report" / "summary.csv") as file:
        table = list(csv.DictReader(file))
    for text, row in zip(table, summary_of(results), strict=True):
        assert text == {key: "" if value is None else str(value) for key, value in row.flat().items()}


def test_every_column_of_the_tables_is_one_of_the_summary():
    assert {column.name for column in COLUMNS} <= {*FIELDS} - {"model", "recipe"}
    shown = {*(column.name for column in COLUMNS), *(f"{column.name}_se" for column in COLUMNS)}
    assert {*FIELDS} <= shown | {"model", "recipe"}


def test_rows_hold_what_the_stages_wrote(results):
    rows = {row.recipe: row for row in summary_of(results)}
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


def test_what_was_refined_and_tuned_is_told_with_its_time_and_loss(tmp_path):
    wanted = trained(plan(["dense", "nowag", "armor"]), "armor", "refine", "tune")
    report = build(write_results(tmp_path, wanted, 4), wanted, tmp_path / "report")
    stages = ("factorize", "refine", "tune")
    layers = [LayerRecord.read(Results(str(tmp_path)).layer(MODEL, "armor", k, s)) for s in stages for k in range(4)]
    assert report.rows[2].factorize_seconds == pytest.approx(sum(layer.seconds for layer in layers))
    page = page_of(tmp_path)
    table = page[page.index(">Training</h3>") :]
    cells = re.findall(r"<td[^>]*>(?:<data[^>]*>)?([^<]*)", table[: table.index("</table>")])
    assert [cell for cell in cells if cell] == [
        *("8.0 M", "compressed", "wiki.valid.raw", "128 × 1,024", "8", "48", "1", "0.625", "1 of 4 layers"),
        *("2.0 M", "wiki.valid.raw", "128 × 1,024", "8", "48", "0.200", "0.100", "no"),
    ]
    said = " ".join(html.unescape(page).split())
    assert (
        "Refined: A, B, the values of S of each decoder layer were trained until its output, behind the refined layers "
        "before it, was close to the dense one's, in 48 steps of 4 sequences of 1,024 tokens, out of 128 of "
        "wiki.valid.raw (Adam, a rate of 0.005 of each tensor's root mean square, lower where that was too high)."
    ) in said
    assert "Tuned: A, B, the values of S of the whole model were trained to predict what the dense one" in said
    assert "Refine</th>" in page and "Tune</th>" in page
    assert "Output error by decoder layer" in page


@pytest.mark.parametrize(
    "file, gaps",
    [
        ("armor/evaluation/wikipedia.json", {"perplexity", "perplexity_se"} | AGAINST_DENSE),
        ("benchmark/decode.json", {"decode_tokens_per_second"}),
        ("armor/checkpoint.json", {"bits_per_weight", "checkpoint_bytes", "compressed_share"}),
        ("armor/layers/layer_1.json", {"relative_loss", "factorize_seconds"}),
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


def test_experts_that_saw_no_token_are_named(own):
    model = model_of(own)
    assert not unrouted(model)
    experts = tuple(f"model.layers.{layer}.mlp.experts.{number}" for layer, number in ((3, 0), (3, 1), (3, 4), (4, 7)))
    name, record = next(iter(model.calibrations.items()))
    changed = replace(model, calibrations={name: record.model_copy(update={"unrouted_experts": experts})})
    (line,) = unrouted(changed)
    assert line.startswith(f"4 experts saw no token of the calibration {name}") and line in summarize(changed)
    assert line.endswith(": model.layers.3.mlp.experts 0 to 1, 4; model.layers.4.mlp.experts 7.")


def test_a_recipe_without_any_result_still_has_its_row(own):
    wanted = plan(["dense", "armor", "wanda"], evaluations=["elsewhere", "wikipedia"])
    built = build(own, wanted, own / "report").rows
    assert [value for key, value in built[2].flat().items() if key not in FIELDS[:4]] == [None] * len(FIELDS[4:])
    assert built[1].perplexity is None  # of the first evaluation, which nobody ran
    gaps = "dense: evaluation elsewhere; armor: evaluation elsewhere; wanda: evaluation elsewhere, evaluation wikipedia"
    assert f"Missing, and left as gaps: {gaps}, benchmark decode, checkpoint, some decoder layers." in page_of(own)


def test_no_result_at_all_is_an_error(tmp_path):
    with pytest.raises(ArmorError, match="holds no result"):
        build(tmp_path, plan(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "file, key",
    [
        ("armor/checkpoint.json", "seconds"),
        ("armor/layers/layer_0.json", "modules"),
        ("armor/evaluation/wikipedia.json", "value"),
        ("benchmark/decode.json", "recipes"),
    ],
)
def test_a_record_of_something_else_is_one_error(own, file, key):
    path = own / MODEL / file
    write_json(path, {name: value for name, value in read_json(path).items() if name != key})
    with pytest.raises(ArmorError, match=f"{path}: {key}: is missing"):
        rows_of(own)


def test_the_page_says_what_made_the_models(results):
    assert f"armor: source {'a' * 16}, calibration {'b' * 16}, code {'c' * 16}, seed 0" in page_of(results)
    made = ReportRecord.read(results / "report" / "summary.json").made_by
    assert made.stage == "armor.report" and made.settings == plan().model_dump(mode="json")


def test_the_report_names_every_record_that_it_is_made_of(tmp_path):
    wanted = plan(["dense", "armor"], tasks={"reading": ["last_word"]})
    write_results(tmp_path, wanted, LAYERS)
    records = {
        file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.json") if file.parent.name != "layers"
    }
    build(tmp_path, wanted, tmp_path / "report")
    named = ReportRecord.read(tmp_path / "report" / "summary.json").made_by.inputs.keys()
    assert named == records - {f"{MODEL}/source.json", f"{MODEL}/model.json"}  # a checkpoint stands for its layers


def test_the_page_gives_back_the_configuration_to_run_it_again(results):
    page = page_of(results)
    shown = html.unescape(re.search(r'aria-label="The configuration">(.*?)</pre>', page, re.DOTALL)[1])
    linked = unquote(re.search(r'href="data:text/yaml;charset=utf-8,([^"]+)"', page)[1])
    assert yaml.safe_load(shown) == yaml.safe_load(linked) == plan().config  # 2:4 stays a text
    assert list(yaml.safe_load(shown)["recipes"]) == list(PERPLEXITY)  # in their order
    assert "snakemake --cores 2 --configfile config.yaml" in page


def test_the_page_says_what_each_stage_ran_on_once(own):
    changed = {"device": "A card", "threads": 1, "versions": MACHINE.versions | {"torch": "2.14.0"}}
    file = Results(str(own)).layer(MODEL, "armor", 1)
    change(LayerRecord, file, machine=lambda record: record.machine.model_copy(update=changed))
    build(own, plan(["dense", "nowag", "armor"]), own / "report")
    page = page_of(own)
    assert re.findall("<li>(.*)</li>", page[page.index(">How to reproduce<") :])[:4] == [
        "calibrate, factorize, assemble, evaluate, benchmark: A processor, 2 of 2 cores",
        "factorize: A card, 1 of 2 cores",
        "calibrate, factorize, assemble, evaluate, benchmark: python 3.11.7, torch 2.13.0, transformers 5.24.0",
        "factorize: python 3.11.7, torch 2.14.0, transformers 5.24.0",
    ]


def test_a_report_by_hand_without_a_configuration_offers_none(own):
    wanted = plan(["dense", "nowag", "armor"])
    build(own, wanted.model_copy(update={"config": {}}), own / "report")
    assert "config.yaml" not in page_of(own) and "A processor, 2 of 2 cores" in page_of(own)


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


class _Page(HTMLParser):
    """Counts elements, collects ids and references, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.figures: list[dict] = []
        self.marks: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "svg":
            self.figures.append(attributes)
            self.marks.append(0)
        if tag in ("path", "line", "text") and "svg" in self.open:
            self.marks[-1] += 1

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_and_every_figure_has_marks_and_words(results):
    text = page_of(results)
    page = _Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(reference in page.ids for reference in re.findall(r"url\(#([^)]+)\)", text))
    assert len(page.figures) == 12 == text.count("<figcaption>")
    for figure, marks in zip(page.figures, page.marks, strict=True):
        assert figure["role"] == "img" and len(figure["aria-label"]) > 30
        assert marks > 10
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())


def test_what_one_could_take_instead_is_on_the_page(results):
    found = page_of(results).partition(">What you could take instead</h3>")[2].partition('<div class="figures">')[0]
    assert found.count("<figcaption>On the front: ") == 4 == len([*results.glob("report/figures/m0-front-*.svg")])
    assert "On the front: nowag, armor, dense. Far above, and not drawn: magnitude 1,179." in found
    assert "Perplexity over speed: nowag 113.2 at 0.9225, " in found and "armor 30.96 at 0.6620" in found
    assert "At most 12 bits a weight: armor is the best, with a perplexity of 30.96 (1.36 times" in found
    assert "bits, 0.66 times as fast as dense." in found and "Diamonds are ARMOR." in found


def test_a_recipe_is_an_offer_where_bits_and_perplexity_are_known(own):
    def offered():
        return {offer.name: offer for offer in offers(model_of(own))}

    assert list(offered()) == ["nowag", "armor", "dense"]  # by bits
    assert [offer.speed for offer in offered().values()] == [pytest.approx(r / 14.2) for r in (13.1, 9.4, 14.2)]
    without_benchmark(own, "nowag")
    assert offered()["nowag"].speed is None and offered()["dense"].speed == 1
    of_four = {"4": benchmark_of(own).recipes["armor"].speedup["4"]}
    change_side(own, "armor", speedup=of_four)  # a batch is another speed
    assert {choice.speed for choice in offered().values()} == {None}
    (own / MODEL / "armor/checkpoint.json").unlink()
    assert list(offered()) == ["nowag", "dense"]
    (own / MODEL / "nowag/evaluation/wikipedia.json").unlink()
    assert list(offered()) == ["dense"]


def test_quantization_without_pruning_is_not_called_pruning(tmp_path):
    wanted = plan(["dense", "nowag", "armor"])
    write_results(tmp_path, wanted, LAYERS)
    change(EvaluationRecord, evaluation_of(tmp_path, "nowag"), value=20.0)
    pair = wanted.pairs[1].model_copy(update={"method": "int8", "title": "int8", "pattern": "1:1"})
    changed = wanted.model_copy(update={"pairs": [wanted.pairs[0], pair, wanted.pairs[2]]})
    words = summarize(read_results(tmp_path, changed)[0])[0]
    assert "the best quantization without pruning, int8 (recipe nowag), has 20.00" in words
    assert "where int8 makes it" in words


def test_block_sizes_have_a_figure_where_three_recipes_differ_in_nothing_else(tmp_path):
    sizes = {f"armor-{size}": size for size in (8, 16, 32, 64)}
    wanted = plan(["dense", *sizes], block_sizes=sizes)
    write_results(tmp_path, wanted, LAYERS)
    change(EvaluationRecord, evaluation_of(tmp_path, "armor-8"), value=60.0)

    def drawn():
        found = figures(read_results(tmp_path, wanted)[0], "m0")
        return next((figure.svg for figure in found if figure.name == "m0-blocks"), None)

    assert "Perplexity by block size, log scale: 8 60.00, 16 30.96, 32 30.96, 64 30.96." in drawn()
    assert {">8<", ">64<", ">60.00<", ">dense<", ">block size<"} <= set(re.findall(">[^<>]+<", drawn()))
    chains = {name: [("factorize", name), ("refine", name)] for name in ("armor-8", "armor-64")}
    for recipe in chains:  # two are refined
        (tmp_path / MODEL / recipe / "refined").symlink_to(tmp_path / MODEL / recipe / "layers")
    pairs = [pair.model_copy(update={"chain": chains.get(pair.recipe, pair.chain)}) for pair in wanted.pairs]
    found = figures(read_results(tmp_path, wanted.model_copy(update={"pairs": pairs}))[0], "m0")
    assert not any(figure.name == "m0-blocks" for figure in found)
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


def figure_of(root, name, **changes):
    """A figure of the report on three recipes, with the texts in it; None where there is none."""
    figure = next((f for f in figures(model_of(root, **changes), "m0") if f.name == name), None)
    return figure and (figure, re.findall(">([^<>]+)</text>", figure.svg))


def test_a_task_has_a_figure_with_its_best_recipe_on_top(tmp_path):
    tasks = {"reading": ["accuracy", "brier_loss", "mixed", "points"]}
    write_results(tmp_path, plan(["dense", "nowag", "armor"], tasks=tasks), LAYERS)
    points = {"metric": "word_points", "value": -3.5, "standard_error": None}
    for path in tmp_path.glob(f"{MODEL}/*/evaluation/reading.json"):
        change_tasks(path, mixed={"higher_is_better": None}, points=points)

    def rows(number):
        figure, texts = figure_of(tmp_path, f"m0-task-{number}", tasks=tasks)
        return figure, [text for text in texts if text in ("dense", "nowag", "armor")], texts

    figure, order, texts = rows(0)
    assert order == ["dense", "armor", "nowag"] and {"55.0%", "47.5%", "40.2%", "40%"} <= {*texts}
    assert "Accuracy by recipe on accuracy: dense 55.0 ± 5.0%, armor 47.5 ± 5.0%, nowag 40.2 ± 5.0%." in figure.svg
    assert figure.title == "Accuracy on accuracy" and "best on top" in figure.caption
    figure, order, texts = rows(1)
    assert order == ["nowag", "armor", "dense"] and "accuracy (lower is better)" in texts
    figure, order, texts = rows(2)  # nobody says which is better: as they stand in the plan
    assert order == ["dense", "nowag", "armor"] and "best" not in figure.caption and "accuracy" in texts
    figure, order, texts = rows(3)  # no share and no error
    assert figure.title == "Word points on points" and texts.count("-3.500") == 3 and "%" not in "".join(texts)
    assert "points: dense -3.500, nowag -3.500, armor -3.500." in figure.svg


def test_the_figure_of_a_task_has_gaps_and_needs_one_result(tmp_path):
    tasks = {"reading": ["last_word"]}
    write_results(tmp_path, plan(["dense", "nowag", "armor"], tasks=tasks), LAYERS)
    dashed = 'stroke-dasharray="3,3"'
    assert figure_of(tmp_path, "m0-task-0", tasks=tasks)[0].svg.count(dashed) == 1
    (tmp_path / MODEL / "dense" / "evaluation" / "reading.json").unlink()
    figure, texts = figure_of(tmp_path, "m0-task-0", tasks=tasks)
    assert "dense" not in texts and "dense" not in figure.caption and dashed not in figure.svg
    for recipe in ("nowag", "armor"):
        (tmp_path / MODEL / recipe / "evaluation" / "reading.json").unlink()
    assert figure_of(tmp_path, "m0-task-0", tasks=tasks) is None


def test_figures_of_speed_have_a_dot_for_each_recipe_and_batch_or_shape(own):
    def dots(figure):
        """Of each recipe's colour how many circles there are, the legend's not counted."""
        marks = figure.svg.partition('class="mark-symbol role-mark')[2].partition("</g>")[0]
        return sorted(marks.count(f'fill="{color}"') for color in {*re.findall(r'fill="(var[^"]+)"', marks)})

    figure, texts = figure_of(own, "m0-decoding-0")
    assert "by batch size: nowag: batch 1 0.923×, batch 4 0.923×; armor: batch 1 0.662×, batch 4 0.662×." in figure.svg
    assert {"batch 1", "batch 4", "times as fast as dense"} <= {*texts} and dots(figure) == [2, 2]
    assert figure.svg.count('stroke-dasharray="3,3"') == 1
    figure, texts = figure_of(own, "m0-linears-0")
    shapes = [text for text in texts if "×" in text]
    assert shapes == ["576 × 576", "192 × 576", "1536 × 576", "576 × 1536"] and dots(figure) == [4, 4]
    measured = benchmark_of(own).recipes["armor"].linears
    told = ", ".join(f"{s} {number(m.speedup.median, 3)}×" for s, m in zip(shapes, measured, strict=True))
    assert f"armor: {told}" in figure.svg


def test_figures_of_speed_have_gaps_and_need_one_compressed_recipe_that_is_measured(own):
    for recipe, left in (("nowag", {"armor"}), ("armor", None)):
        without_benchmark(own, recipe)
        for name in ("m0-decoding-0", "m0-linears-0"):
            found = figure_of(own, name)
            assert (found and {*found[1]} & {"nowag", "armor"}) == left


def test_figures_are_files_of_their_own_too(own):
    """Those of the page, sized, and in colours that any program knows; none is left of an earlier report."""
    both = {"m0-front-bits", "m0-front-speed"}
    without_kl = (["dense", "nowag"], both)  # the dense model has none, and one recipe is no figure
    for recipes, panels in (
        (["dense", "nowag", "armor"], both | {"m0-front-kl-bits", "m0-front-kl-speed"}),
        without_kl,
    ):
        build(own, plan(recipes), own / "report")
        files = sorted((own / "report" / "figures").glob("*"))
        names = {figure.name for figure in figures(model_of(own, *recipes), "m0")}
        assert {file.stem for file in files} == names | panels and {file.suffix for file in files} == {".svg"}
        for file in files:
            root = ElementTree.fromstring(file.read_text())
            assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
            assert "var(" not in file.read_text() and 'fill="#ffffff"' in file.read_text()


def test_labels_cover_neither_each_other_nor_a_point():
    places = [(20.0, 100.0, "wanda"), (20.0, 104.0, "nowag"), (24.0, 96.0, "magnitude"), (250.0, 100.0, "armor")]
    labels = beside(places, 290)
    assert [left for left, _ in labels] == [False, False, False, True]
    heights = sorted(y for _, y in labels[:3])
    assert all(b - a >= 12 for a, b in zip(heights, heights[1:], strict=False))
    assert labels[3][1] == 92


def test_colours_follow_the_theme(results):
    charts = "".join(re.findall(r"<svg.*?</svg>", page_of(results), re.DOTALL))
    assert set(re.findall(r'(?:fill|stroke)="([^"v][^"]*)"', charts)) <= {"none", "transparent"}
    used = set(re.findall(r"var\((--[\w-]+)", charts))
    light, dark = page_of(results).split("prefers-color-scheme: dark")
    for name in used:
        assert f"{name}:" in light and f"{name}:" in dark


def test_the_best_compressed_values_are_bold(results):
    bold = re.findall(r'class="[^"]*\bbest\b[^"]*" *><data[^>]*>([^<]+)<', page_of(results))
    assert (
        {"30.96 ± 2.79", "0.352 ± 0.009", "70.1 ± 0.4%"} <= {*bold}
        and bold.count("9.00") == 3
        and bold.count("176 MB") == 3
    )
    assert not any(text.startswith(("22.75", "16.00")) for text in bold)


def test_the_summary_says_what_each_cell_sorts_by_but_of_a_gap(results):
    rows = summary_of(results)
    table = re.search(r'<table[^>]*class="data sortable".*?</table>', page_of(results), re.DOTALL)[0]
    head, _, body = table.partition("<tbody>")
    headings = head.count("<th") - head.count("<thead") - 1  # that of the recipe's name
    for line, row in zip(body.split("<tr>")[1:], rows, strict=True):
        gaps = len(re.findall(">–</td>", line))
        values = re.findall(r'<data value="([^"]+)">', line)
        assert gaps + len(values) == line.count("<td") == headings
        assert values[0] == str(row.perplexity)
        assert gaps == sum(getattr(row, column.name) is None for column in COLUMNS if column.name != "compressed_share")


def test_what_is_left_out_of_a_model_has_a_column(own):
    assert "compressed" not in print_table(list(rows_of(own).values())).splitlines()[1]
    paths = Results(str(own))
    record = CheckpointRecord.read(paths.checkpoint(MODEL, "armor"))
    names = tuple(linear.name for linear in Topology.read(paths.topology(MODEL)).linears())
    record.model_copy(update={"kept_dense": names[::2]}).write(paths.checkpoint(MODEL, "armor"))
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
    assert "213 MB, 78% of the dense model's 273 MB" in words
    assert "11.74 bits instead of 16" in words
    sides = (benchmark_of(results).recipes["armor"], benchmark_of(results).dense)
    own, dense = (number(side.tokens_per_second["1"].decode.median, 3) for side in sides)
    assert f"writes {own} tokens per second in the median, that one {dense}; within a turn it is 0.662" in words
    assert "16 blocks of 1,024 tokens" in words and "measured on the same blocks" in words
    assert missing(model) == []


@pytest.mark.parametrize("left, shown", [(48, "48"), (32, "32 to 48")], ids=["one", "two"])
def test_the_block_size_shown_is_the_one_used(tmp_path, left, shown):
    wanted = plan(["dense", "armor"], block_sizes={"armor": 50})
    write_results(tmp_path, wanted, LAYERS)
    blocks = {"block_sizes": BlockSizes(left=left, right=48)}
    for path in tmp_path.glob(f"{MODEL}/armor/layers/*.json"):
        change(LayerRecord, path, modules=lambda r: {n: m.model_copy(update=blocks) for n, m in r.modules.items()})
    rows = build(tmp_path, wanted, tmp_path / "report").rows
    assert rows[1].block_sizes == tuple(map(int, shown.split(" to ")))
    assert re.search(rf"^armor +{shown} ", print_table(rows), re.MULTILINE)
    page = page_of(tmp_path)
    assert f"(2:4, blocks of {shown})" in page and f'<data value="{left}">{shown}</data>' in page
    assert f"armor: blocks of 50 were asked for, {shown.replace('to', 'and')} divide the dimensions." in page


TOY = '''"""Nothing is kept."""

from armor.methods import method


@method("Toy & Co", source="nowhere", memory=lambda shape, itemsize, **settings: 0)
def toy(weight, *, pattern, {setting}=0):
    return weight
'''


@pytest.mark.parametrize("setting, blocks", [("seed", ""), ("block_size", ", blocks of 64")])
def test_a_method_that_is_one_file_is_reported_with_its_title(own, tmp_path, setting, blocks):
    (tmp_path / "toy.py").write_text(TOY.format(setting=setting))
    armor.methods.__path__.append(str(tmp_path))
    try:
        importlib.import_module("armor.methods.toy")
        wanted = plan(["dense", "nowag"])
        pair = wanted.pairs[1].model_copy(update={"method": "toy", "title": "Toy & Co"})
        report = build(own, wanted.model_copy(update={"pairs": [wanted.pairs[0], pair]}), own / "report")
        assert report.rows[1].method == "toy" and "Toy & Co" in print_table(report.rows)
        assert "| Toy & Co |" in (own / "report" / "summary.md").read_text()
        assert f"Toy &amp; Co (recipe nowag, 2:4{blocks}) has a perplexity of" in page_of(own)
        assert ("Loss by layer and module: nowag" in page_of(own)) is bool(blocks)
    finally:
        armor.methods.__path__.remove(str(tmp_path))
        del METHODS["toy"], sys.modules["armor.methods.toy"]


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
    drawn = heat_map(mixture, "heat")
    assert drawn.caption.endswith("Of experts it is the mean.")


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
    model = model_of(own)
    assert "1.36 ± 0.00 times the dense model's" in summarize(model)[0]


def test_recipes_measured_differently_are_not_called_comparable(own):
    change(EvaluationRecord, evaluation_of(own, "nowag"), blocks=8)
    model = model_of(own)
    assert "compare with care" in " ".join(summarize(model))


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
    write_results(tmp_path, wanted, LAYERS)
    rows = build(tmp_path, wanted, tmp_path / "report").rows
    assert [(row.model, row.recipe) for row in rows][2:4] == [("first", "armor-b"), ("second", "dense")]
    page = page_of(tmp_path)
    for title in ("Perplexity on wiki", "Perplexity on c4", "By text", "Memory and speed: long"):
        assert page.count(f">{title}</h3>") == 2
    assert page.count("Loss by layer and module: armor-") == 4
    assert len(_Page(page).ids) == len(set(_Page(page).ids))


def samples_of(root):
    """The table of samples: the texts by recipe, without their markup."""
    table = page_of(root).partition(">What they write</h3>")[2].partition("</table>")[0]
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    return {html.unescape(name): [html.unescape(text) for text in texts] for name, *texts in lines}


def test_samples_stand_side_by_side_and_a_missing_one_is_a_gap(own):
    prompt, other = PROMPTS
    first, second = benchmark_of(own).samples
    texts = first.texts | {"armor": "<b>\n\n \x1b[1m_a_"}, {n: t for n, t in second.texts.items() if n != "armor"}
    changed = [Continuation(prompt=p, texts=t) for p, t in zip((prompt, other), texts, strict=True)]
    change(BenchmarkRecord, Results(str(own)).benchmark(MODEL, "decode"), samples=changed)
    build(own, plan(["dense", "nowag", "armor"]), own / "report")
    found = samples_of(own)
    assert found["Recipe"] == [f"{prompt} …", f"{other} …"]
    assert found["dense"] == ["Paris.", "met a crow."] and found["armor"] == ["<b> ↵ \ufffd[1m_a_", "–"]
    assert found["nowag"][1].startswith("met a crow, ↵ nowag.") and list(found)[1:] == ["dense", "nowag", "armor"]


def test_the_dense_model_writes_too_where_it_is_no_recipe(own):
    build(own, plan(["nowag", "armor"]), own / "report")
    assert list(samples_of(own)) == ["Recipe", "dense", "nowag", "armor"] and samples_of(own)["dense"][0] == "Paris."


def test_without_samples_there_is_no_table_of_them(own):
    change(BenchmarkRecord, Results(str(own)).benchmark(MODEL, "decode"), samples=())
    build(own, plan(["dense", "nowag", "armor"]), own / "report")
    assert samples_of(own) == {} and "Memory and speed: decode" in page_of(own)


def table_of(root, title):
    """The headings of a table, and of each row its texts by heading."""
    table = page_of(root).partition(f">{title}</h3>")[2].partition("</table>")[0]
    (_, *headings), *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    return {name: dict(zip(headings, texts, strict=True)) for name, *texts in rows}


def test_memory_and_speed_stand_side_by_side_with_their_quartiles_and_with_theory(own):
    without_benchmark(own, "nowag")
    build(own, plan(["dense", "nowag", "armor"]), own / "report")
    table = table_of(own, "Memory and speed: decode")
    assert {*table["nowag"].values()} == {"–"}
    side = benchmark_of(own).recipes["armor"]
    runs = side.tokens_per_second["4"].decode
    low, high = (number(value, 3) for value in runs.quartiles)
    assert table["armor"]["Decode, batch 4"] == f"{number(runs.median, 3)} ({low} to {high})"
    assert table["armor"]["Beside dense, 1"] == "0.662 ×" and table["armor"]["In theory"] == "1.36 ×"
    core = side.core.speedup["4"].decode.median
    assert table["armor"]["Without blocks, 4"] == f"{number(core, 3)} ×" and table["dense"]["Without blocks, 4"] == "–"
    assert table["armor"]["Memory, loaded"] == "280 MB" and table["armor"]["At the peak"] == "410 MB"
    assert table["dense"]["In theory"] == table["dense"]["Beside dense, 1"] == "–" != table["dense"]["Prefill, batch 4"]
    shapes = ["576 × 576", "192 × 576", "1536 × 576", "576 × 1536"]
    linears = table_of(own, "Speed by linear: decode")
    assert [name.replace("\xa0", " ") for name in linears] == [f"armor, {shape}, 2:4, blocks 64" for shape in shapes]
    for shape, measured in zip(linears.values(), side.linears, strict=True):
        assert shape["Packed, ms"].startswith(f"{number(measured.milliseconds.median, 3)} (")
        assert (shape["Linears"], shape["In theory"]) == ("60", "1.36 ×")
        assert shape["Without blocks, ms"].startswith(f"{number(measured.core_milliseconds.median, 3)} (")


def test_where_the_core_was_not_timed_there_are_gaps(own):
    linears = benchmark_of(own).recipes["armor"].linears
    gaps = {"core_milliseconds": None, "core_speedup": None}
    change_side(own, "armor", core=None, linears=tuple(shape.model_copy(update=gaps) for shape in linears))
    build(own, plan(["dense", "nowag", "armor"]), own / "report")
    armor = table_of(own, "Memory and speed: decode")["armor"]
    assert armor["Without blocks, 1"] == "–" and armor["Beside dense, 1"] == "0.662 ×"
    assert {row["Without blocks, ms"] for row in table_of(own, "Speed by linear: decode").values()} == {"–"}


@pytest.fixture
def served(tmp_path):
    """A results folder with a benchmark behind a server, and what its report is about."""
    wanted = plan(["dense", "nowag", "armor"], serving=["serve"])
    return write_results(tmp_path, wanted, LAYERS), wanted


def loads_of(side):
    return [(count, side.clients[count]) for count in ("1", "4", "16")]


def serving_of(root):
    return ServingRecord.read(Results(str(root)).benchmark(MODEL, "serve"))


def test_the_table_of_a_server_has_speeds_by_clients_and_memory(served):
    root, wanted = served
    build(root, wanted, root / "report")
    table, own = table_of(root, "Served by vLLM: serve"), serving_of(root).recipes["armor"]
    assert list(table)[:4] == ["dense, 1 client", "dense, 4 clients", "dense, 16 clients", "nowag, 1 client"]
    load = own.clients["16"]
    low, high = (number(value, 3) for value in load.tokens_per_second.quartiles)
    row = table["armor, 16 clients"]
    assert row["Tokens/s"] == f"{number(load.tokens_per_second.median, 3)} ({low} to {high})"
    assert row["Beside dense"] == "0.662 ×" and table["dense, 16 clients"]["Beside dense"] == "–"
    assert row["First token, ms"].startswith(f"{number(load.first_token_milliseconds.median, 3)} (")
    assert row["Memory"] == size(own.memory_bytes.median)
    assert ReportRecord.read(root / "report/summary.json").made_by.inputs[f"{MODEL}/benchmark/serve.json"]


def test_throughput_over_clients_has_a_line_for_each_model(served):
    root, wanted = served
    svg = next(f.svg for f in figures(read_results(root, wanted)[0], "m0") if f.name == "m0-throughput-0")
    for name, side in {"dense": serving_of(root).dense, **serving_of(root).recipes}.items():
        told = [f"{count} {number(load.tokens_per_second.median, 3)}" for count, load in loads_of(side)]
        assert f"{name}: {', '.join(told)}" in svg
    assert {"1", "4", "16", "dense", "nowag", "armor", "tokens per second"} <= {*re.findall(r">([^<>]+)</text>", svg)}


def test_a_recipe_that_was_not_served_is_a_gap(served):
    root, wanted = served
    path = Results(str(root)).benchmark(MODEL, "serve")
    change(ServingRecord, path, recipes=lambda r: {name: side for name, side in r.recipes.items() if name != "nowag"})
    build(root, wanted, root / "report")
    assert not [name for name in table_of(root, "Served by vLLM: serve") if name.startswith("nowag")]
    assert "nowag: benchmark serve." in page_of(root)
    os.unlink(path)
    build(root, wanted, root / "report")
    assert "Served by vLLM" not in page_of(root) and "Throughput" not in page_of(root)
    assert "armor: benchmark serve." in page_of(root)


def test_recipes_that_did_not_fit_together_are_named_by_their_turns(own):
    path = Results(str(own)).benchmark(MODEL, "decode")
    for turns, told in (((("nowag", "armor"),), False), ((("nowag",), ("armor",)), True)):
        change(BenchmarkRecord, path, turns=turns)
        build(own, plan(["dense", "nowag", "armor"]), own / "report")
        assert ("those that took turns with the dense model are nowag; armor." in page_of(own)) is told


def test_without_compressed_linears_there_is_no_table_of_them(own):
    build(own, plan(["dense"]), own / "report")
    assert "Memory and speed: decode" in page_of(own) and "Speed by linear" not in page_of(own)


def test_the_terminal_table_fits_and_marks_the_best(results):
    rows = summary_of(results)
    text = print_table(rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == f"{MODEL}, 2:4"
    armor = next(line for line in lines if line.startswith("armor"))
    assert re.search(r" \*30\.96 ± 2\.79 +\*0\.352 +\*70\.1% ", armor) and " 213 MB " in armor


def test_markdown_has_a_row_per_recipe_with_errors_gaps_and_the_best_in_bold(results):
    lines = (results / "report" / "summary.md").read_text().splitlines()
    assert lines[0] == f"## {MODEL}, 2:4"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    headings = "recipe, block, perplexity, KL, same top, rel. loss, bits/weight, size, factorize, tokens/s"
    assert cells[0] == headings.split(", ")
    assert [row[0] for row in cells[2:]] == list(PERPLEXITY)
    dense, armor = cells[2], cells[6]
    assert dense[2] == "22.75 ± 2.05" and dense[1] == dense[3] == dense[4] == "–"
    assert armor[1:5] == ["64", "**30.96 ± 2.79**", "**0.352 ± 0.009**", "**70.1 ± 0.4%**"]
    assert [row[6] for row in cells[2:]] == ["16.00", "**9.00**", "**9.00**", "**9.00**", "11.74"]


def test_latex_is_a_table_of_booktabs_that_says_the_same_as_markdown(results):
    text = (results / "report" / "summary.tex").read_text()
    assert all(text.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"))
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r"\\")]
    plain = [
        re.sub(r"\\textbf\{([^}]*)\}", r"**\1**", line).replace(r"$\pm$", "±").replace("--", "–").replace(r"\%", "%")
        for line in lines
    ]
    table = (results / "report" / "summary.md").read_text().splitlines()[2:]
    expected = [[cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2:])]
    assert [[cell.strip() for cell in line.split(" & ")] for line in plain] == expected
    assert text.isascii()


def test_of_several_texts_each_has_perplexity_kl_and_agreement_the_best_of_each_in_bold(tmp_path):
    wanted = plan(["dense", "wanda", "nowag", "armor"], evaluations=["wiki", "c4"])
    write_results(tmp_path, wanted, LAYERS)
    for recipe, value in (("nowag", 31.5001), ("armor", 31.5)):  # the same to a reader
        change(EvaluationRecord, evaluation_of(tmp_path, recipe, "c4"), value=value, standard_error=1.25)
    (tmp_path / MODEL / "nowag" / "evaluation" / "wiki.json").unlink()
    build(tmp_path, wanted, tmp_path / "report")
    text = (tmp_path / "report" / "summary.md").read_text()
    lines = text[text.index("by text") :].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["recipe", *(f"{text}{end}" for text in ("wiki", "c4") for end in ("", ": KL", ": same top"))]
    dense, wanda, nowag, armor = cells[2:]
    assert dense[2:4] == ["–", "–"] and nowag[1:4] == ["–", "–", "–"]
    assert nowag[4] == armor[4] == "**31.50 ± 1.25**" and all("**" in cell for cell in (*armor[1:4], *armor[5:]))
    assert "**" not in "".join(wanda + dense)
    assert "31.50 ± 1.25" in page_of(tmp_path)
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


@pytest.mark.parametrize(
    "shown, expected",
    [
        (number(22.7512), "22.75"),
        (number(1179.3), "1,179"),
        (number(9.99996), "10.00"),
        (number(0.013461, 3), "0.0135"),
        (number(0), "0"),
        (number(None), "–"),
        (plus_minus(113.21, 12.44), "113.2 ± 12.4"),
        (plus_minus(5.12, None), "5.120"),
        (percent(0.7012), "70.1%"),
        (percent(0.7012, 0.0041), "70.1 ± 0.4%"),
        (size(269_060_552), "269 MB"),
        (size(141_000_000_000), "141 GB"),
        (size(444_100), "444 kB"),
        (duration(75.3), "75 s"),
        (duration(403), "6.7 min"),
        (duration(9000), "2.5 h"),
    ],
)
def test_numbers_are_written_for_people(shown, expected):
    assert shown == expected


def test_tasks_have_their_columns_and_a_missing_result_is_a_gap(tmp_path):
    tasks = {"reading": ["last_word", "continuation"], "more": ["last_word"]}
    wanted = plan(["dense", "armor", "nowag"], tasks=tasks)
    write_results(tmp_path, wanted, LAYERS)
    (tmp_path / MODEL / "armor" / "evaluation" / "more.json").unlink()
    rows = build(tmp_path, wanted, tmp_path / "report").rows
    names = ["last_word", "continuation", "more.last_word"]
    assert list(rows[0].flat())[len(FIELDS) :] == [f"{name}{end}" for name in names for end in ("", "_se")]
    assert [rows[0].score(name).value for name in names] == [0.55, 0.55, 0.55]
    assert [rows[1].score(name).value for name in names] == [pytest.approx(0.47525), pytest.approx(0.47525), None]
    assert (tmp_path / "report" / "summary.csv").read_text().splitlines()[2].endswith(",,")
    assert "Tasks are part of evaluate." in page_of(tmp_path)
    assert "armor: tasks more" in page_of(tmp_path) and 'best" >47.5 ± 5.0%</td>' in page_of(tmp_path)
    assert ">40.2 ± 5.0%</td>" in page_of(tmp_path) and 'best" >40.2' not in page_of(tmp_path)
    assert summary_of(tmp_path) == rows
    text = print_table(rows)
    assert re.search(r"last_word +continuation +more.last_word$", text, re.MULTILINE)
    assert re.search(r"^armor +\*47.5 ± 5.0% +\*47.5 ± 5.0% +–$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 110


def test_the_best_of_a_task_is_what_its_metric_says(tmp_path):
    names = ["accuracy", "brier_loss", "mixed"]
    wanted = plan(["dense", "armor", "nowag"], tasks={"questions": names})
    write_results(tmp_path, wanted, LAYERS)
    for path in tmp_path.glob(f"{MODEL}/*/evaluation/questions.json"):
        change_tasks(path, mixed={"higher_is_better": None})
    build(tmp_path, wanted, tmp_path / "report")
    best = {"accuracy": "47.5 ± 5.0%", "brier_loss": "40.2 ± 5.0%"}  # the highest, the lowest; all values are shares
    table = page_of(tmp_path).partition(">Accuracy on tasks</h3>")[2].partition("</div>\n</div>")[0]
    assert re.findall('best" >([^<]+)<', table) == list(best.values())
    assert "Lower is better: brier_loss." in page_of(tmp_path)
    lines = (tmp_path / "report" / "summary.md").read_text().splitlines()
    headings, _, dense, armor, nowag = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    bold = {h.replace("\\", ""): {*row} for h, *row in zip(headings, dense, armor, nowag, strict=True)}
    assert {name: [cell.strip("*") for cell in bold[name] if cell.startswith("*")] for name in names} == {
        **{name: [text] for name, text in best.items()},
        "mixed": [],
    }
    tex = (tmp_path / "report" / "summary.tex").read_text()
    assert tex.count(r"\textbf{47.5 $\pm$ 5.0\%}") == tex.count(r"\textbf{40.2 $\pm$ 5.0\%}") == 1
