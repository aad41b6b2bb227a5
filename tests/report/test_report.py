"""The report: the rows are those of the JSON, a gap stays a gap, the page stands alone and is always the same."""

import csv
import html
import math
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml

from armor.core.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.format.layout import Results
from armor.format.records.base import BlockSizes
from armor.format.records.benchmark import BenchmarkRecord, Continuation
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.evaluation import EvaluationRecord, TasksRecord
from armor.format.records.layer import LayerRecord
from armor.format.records.report import ReportRecord, Row, Score
from armor.format.records.serving import ServingRecord
from armor.format.records.topology import Topology
from armor.report import build, print_table
from armor.report.columns import summary_rows
from armor.report.front import offers
from armor.report.gather import read_results
from armor.report.numbers import number, size
from armor.report.tables import csv_text, latex_text, markdown_text
from armor.report.words import missing, summarize, unrouted
from tests.report.sample import BITS, BYTES, FILES, PERPLEXITY, PROMPTS, change, plan, trained, write_results

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


def table_of(page, title):
    """The headings of a table, and of each row its texts by heading."""
    table = page.partition(f">{title}</h3>")[2].partition("</table>")[0]
    if not table:
        return {}
    (_, *headings), *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    headings, rows = map(html.unescape, headings), [map(html.unescape, row) for row in rows]
    headings = list(headings)
    return {name.replace("\xa0", " "): dict(zip(headings, texts, strict=True)) for name, *texts in rows}


def with_quartiles(runs):
    low, high = (number(value, 3) for value in runs.quartiles)
    return f"{number(runs.median, 3)} ({low} to {high})"


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


def test_no_result_and_a_record_that_lacks_a_key_are_one_error_each(own, tmp_path):
    with pytest.raises(ArmorError, match="holds no result"):
        build(tmp_path / "empty", plan(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    path = own / MODEL / "armor/layers/layer_0.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != "modules"})
    with pytest.raises(ArmorError, match=f"{path}: modules: is missing"):
        rows_of(own)


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


def test_the_same_json_gives_the_same_bytes(results, forget_drawings):
    names = ("index.html", "summary.csv", "summary.json", "summary.md", "summary.tex")
    first = [(results / "report" / name).read_bytes() for name in names]
    forget_drawings()
    build(results, plan(), results / "again")
    assert [(results / "again" / name).read_bytes() for name in names] == first


def test_a_recipe_is_an_offer_where_bits_and_perplexity_are_known(own):
    change_benchmark(own, recipes=without("nowag"))
    offered = {offer.name: offer.speed for offer in offers(model_of(own))}
    assert offered == {"nowag": None, "armor": pytest.approx(9.4 / 14.2), "dense": 1}
    (own / MODEL / "armor/checkpoint.json").unlink()
    assert [offer.name for offer in offers(model_of(own))] == ["nowag", "dense"]


def change_tasks(path, **changes):
    """Change some of the results of tasks."""
    known = TasksRecord.read(path).tasks
    changed = {task: known[task].model_copy(update=changes[task]) for task in changes}
    change(TasksRecord, path, tasks=known | changed)


def test_figures_are_files_of_their_own_and_none_is_left_of_an_earlier_report(own):
    for recipes in (THREE, ["dense", "nowag"]):
        build(own, plan(recipes), own / "report")
        files = {file.stem: file.read_text() for file in (own / "report" / "figures").glob("*.svg")}
        assert ("m0-front-kl-bits" in files) == (recipes == THREE)  # one recipe is no front
        assert all(ElementTree.fromstring(text).get("viewBox") and "var(" not in text for text in files.values())


def test_the_summary_says_what_was_lost_and_saved(results):
    model = model_of(results, *PERPLEXITY)
    words = " ".join(summarize(model))
    assert "ARMOR (2:4, blocks of 64) has a perplexity of 30.96 ± 2.79; the dense model has 22.75 ± 2.05" in words
    assert "the best pruning method, NoWag-P (2:4), has 113.2 ± 10.2" in words
    assert "0.352 ± 0.009 nats from the dense model's (KL divergence), and at 70.1 ± 0.4% of the positions" in words
    assert "213 MB, 78% of the dense model's 273 MB" in words and "11.74 bits instead of 16" in words
    assert "armor: the blocks make self_attn.k_proj, self_attn.v_proj larger than dense" in page_of(results)
    assert missing(model) == []


def test_experts_that_saw_no_token_are_named(own):
    experts = tuple(f"model.layers.{layer}.mlp.experts.{number}" for layer, number in ((3, 0), (3, 1), (3, 4), (4, 7)))
    change(CalibrationRecord, Results(str(own)).calibration(MODEL, "text"), unrouted_experts=experts)
    (line,) = unrouted(model_of(own))
    assert line.startswith("4 experts saw no token of the calibration text") and line in summarize(model_of(own))
    assert line.endswith(": model.layers.3.mlp.experts 0 to 1, 4; model.layers.4.mlp.experts 7.")


def test_the_block_sizes_shown_are_those_used(tmp_path):
    wanted = plan(["dense", "armor"], block_sizes={"armor": 50})
    write_results(tmp_path, wanted, LAYERS)
    blocks = {"block_sizes": BlockSizes(left=32, right=48)}
    for path in tmp_path.glob(f"{MODEL}/armor/layers/*.json"):
        change(LayerRecord, path, modules=lambda r: {n: m.model_copy(update=blocks) for n, m in r.modules.items()})
    page = built(tmp_path, wanted)
    assert summary_of(tmp_path).rows[1].block_sizes == (32, 48)
    assert "armor: blocks of 50 were asked for, 32 and 48 divide the dimensions." in page


def test_ratios_have_the_error_of_paired_blocks(own):
    means = EvaluationRecord.read(evaluation_of(own, "dense")).block_means
    change(EvaluationRecord, evaluation_of(own, "armor"), block_means=[mean + math.log(1.5) for mean in means])
    assert "1.36 ± 0.00 times the dense model's" in summarize(model_of(own))[0]


def test_recipes_measured_differently_are_not_called_comparable(own):
    change(EvaluationRecord, evaluation_of(own, "nowag"), blocks=8)
    assert "compare with care" in " ".join(summarize(model_of(own)))


def test_recipes_are_compared_on_the_same_text_alone(tmp_path):
    wanted = plan(["dense", "armor", "nowag"], evaluations=["wiki", "c4"])
    pairs = [*wanted.pairs[:2], wanted.pairs[2].model_copy(update={"evaluations": ["c4"]})]
    wanted = wanted.model_copy(update={"pairs": pairs})
    (model,) = read_results(write_results(tmp_path, wanted, LAYERS), wanted)
    assert model.best(blocks=True).name == "armor" and model.best(blocks=False) is None
    assert "NoWag" not in summarize(model)[0]


def test_further_models_evaluations_and_benchmarks_get_their_own_sections(tmp_path):
    wanted = plan(["dense", "armor"], ["first", "second"], ["wiki", "c4"], ["short", "long"])
    page = built(write_results(tmp_path, wanted, LAYERS), wanted)
    assert [row.model for row in summary_of(tmp_path).rows] == ["first", "first", "second", "second"]
    for title in ("Perplexity on wiki", "Perplexity on c4", "Memory and speed: long"):
        assert page.count(f">{title}</h3>") == 2


def test_samples_stand_side_by_side_a_missing_one_is_a_gap_and_nothing_is_markup(own):
    prompts = [f"{prompt} …" for prompt in PROMPTS]
    first, second = benchmark_of(own).samples
    texts = first.texts | {"armor": "<b>\n\n \x1b[1m_a_"}, {n: t for n, t in second.texts.items() if n != "armor"}
    change_benchmark(own, samples=[Continuation(prompt=p, texts=t) for p, t in zip(PROMPTS, texts, strict=True)])
    wanted = plan(["nowag", "armor"])  # the dense model writes too where it is no recipe
    wanted.config["recipes"]["<b>"] = {}
    page = built(own, wanted)
    found = table_of(page, "What they write")
    assert "<b>" not in page and [found["dense"][prompt] for prompt in prompts] == ["Paris.", "met a crow."]
    assert [found["armor"][prompt] for prompt in prompts] == ["<b> ↵ \ufffd[1m_a_", "–"]


def test_memory_and_speed_are_the_records_medians_with_quartiles_and_theory(own):
    change_benchmark(own, recipes=without("nowag"))
    page, side = built(own), benchmark_of(own).recipes["armor"]
    table = table_of(page, "Memory and speed: decode")
    assert {*table["nowag"].values()} == {"–"}
    runs, core = side.tokens_per_second["4"].decode, side.core.speedup["4"].decode.median
    expected = {
        "Decode, batch 4": with_quartiles(runs),
        "Beside dense, 1": "0.662 ×",
        "In theory": "1.36 ×",
        "Without blocks, 4": f"{number(core, 3)} ×",
        "Memory, loaded": "280 MB",
        "At the peak": "410 MB",
    }
    assert {name: table["armor"][name] for name in expected} == expected
    assert table["dense"]["In theory"] == table["dense"]["Beside dense, 1"] == "–"
    shape, measured = table_of(page, "Speed by linear: decode")["armor, 576 × 576, 2:4, blocks 64"], side.linears[0]
    assert shape["Packed, ms"] == with_quartiles(measured.milliseconds)
    assert shape["Without blocks, ms"] == with_quartiles(measured.core_milliseconds)


def test_the_table_of_a_server_has_speeds_by_clients(own):
    wanted, path = plan(THREE, serving=["serve"]), Results(str(own)).benchmark(MODEL, "serve")
    change_benchmark(own, ServingRecord, "serve", recipes=without("nowag"))
    page, side = built(own, wanted), ServingRecord.read(path).recipes["armor"]
    table = table_of(page, "Served by vLLM: serve")
    assert not [name for name in table if name.startswith("nowag")] and "nowag: benchmark serve." in page
    row, load = table["armor, 16 clients"], side.clients["16"]
    assert row["Tokens/s"] == with_quartiles(load.tokens_per_second)
    assert row["First token, ms"] == with_quartiles(load.first_token_milliseconds)
    assert row["Memory"] == size(side.memory_bytes.median) and row["Beside dense"] == "0.662 ×"


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
    assert headings[:7] == ["recipe", "block", "perplexity", "KL", "same top", "rel. loss", "bits/weight"]
    assert [row[0] for row in rows] == list(PERPLEXITY)
    dense, armor = rows[0], rows[4]
    assert dense[2] == "22.75 ± 2.05" and dense[1] == dense[3] == dense[4] == "–"
    assert armor[1:5] == ["64", "**30.96 ± 2.79**", "**0.352 ± 0.009**", "**70.1 ± 0.4%**"]
    assert [row[6] for row in rows] == ["16.00", "**9.00**", "**9.00**", "**9.00**", "11.74"]


def test_latex_says_the_same_as_markdown(results):
    text = (results / "report" / "summary.tex").read_text()
    for mark, plain in ((r"$\pm$", "±"), ("--", "–"), (r"\%", "%")):
        text = text.replace(mark, plain)
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r"\\")]
    found = [re.sub(r"\\textbf\{([^}]*)\}", r"**\1**", line) for line in lines]
    expected = markdown_rows((results / "report" / "summary.md").read_text().splitlines())
    assert [[cell.strip() for cell in line.split(" & ")] for line in found] == expected


def test_of_several_texts_the_best_of_each_is_bold_and_what_reads_the_same_is_as_good(tmp_path):
    wanted = plan(["dense", "wanda", "nowag", "armor"], evaluations=["wiki", "c4"])
    write_results(tmp_path, wanted, LAYERS)
    for recipe, value in (("nowag", 31.5001), ("armor", 31.5)):
        change(EvaluationRecord, evaluation_of(tmp_path, recipe, "c4"), value=value, standard_error=1.25)
    built(tmp_path, wanted)
    text = (tmp_path / "report" / "summary.md").read_text()
    headings, dense, wanda, nowag, armor = markdown_rows(text[text.index("by text") :].splitlines())
    assert headings == ["recipe", *(f"{text}{end}" for text in ("wiki", "c4") for end in ("", ": KL", ": same top"))]
    assert nowag[4] == armor[4] == "**31.50 ± 1.25**" and all("**" in cell for cell in armor[1:])
    assert "**" not in "".join(wanda + dense)


def test_names_are_escaped_in_markdown_and_latex():
    score = Score(task="x_|y", value=0.5, standard_error=0.01, higher_is_better=True)
    rows = [Row(model="a_b", recipe="nowag_1", method="nowag", pattern="2:4", tasks=[score])]
    text = markdown_text(rows)
    assert r"## a\_b, 2:4" in text and r"| nowag\_1 " in text and r" x\_\|y |" in text
    text = latex_text(rows)
    assert r"\caption{a\_b, 2:4}" in text and r"nowag\_1 & " in text and r"x\_|y" in text


def test_tasks_have_their_columns_and_a_missing_result_is_a_gap(tmp_path):
    wanted = plan(["dense", "armor", "nowag"], tasks={"reading": ["last_word"], "more": ["last_word"]})
    write_results(tmp_path, wanted, LAYERS)
    (tmp_path / MODEL / "armor" / "evaluation" / "more.json").unlink()
    page, rows = built(tmp_path, wanted), summary_of(tmp_path).rows
    names = ["last_word", "more.last_word"]
    assert list(rows[0].flat())[len(FIELDS) :] == [f"{name}{end}" for name in names for end in ("", "_se")]
    assert [rows[1].score(name).value for name in names] == [pytest.approx(0.47525), None]
    assert (tmp_path / "report" / "summary.csv").read_text().splitlines()[2].endswith(",,")
    assert "armor: tasks more" in page


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
