"""The configuration: what is checked before anything runs, and what a decoder layer gets of a recipe."""

from __future__ import annotations

import os
import re

import pytest
import yaml

from armor.config.budget import PriceSettings
from armor.config.layers import LayerSettings
from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.reading import parse_settings, read_yaml
from armor.config.recipes import Recipe
from armor.config.run import Config
from armor.config.sources import CalibrationSettings, TextSettings
from armor.config.tasks import PAPER_TASKS, asked_tasks
from armor.core.errors import ArmorError

MODELS = {"tiny": {"folder": "tiny"}}
TEXT = {"text": {"files": ["words.txt"]}}


DENSE = {"dense": {"method": "dense"}}
PIQA = {"tasks": ["piqa"]}
SEVERAL = [TEXT["text"], {"files": ["more.txt"], "documents": [0, 1]}]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"recipes": {"mine": {}}}, "recipes.mine.calibration: not given, and there are 0"),
        ({"recipes": DENSE, "evaluations": {"a": TEXT}, "runs": [{"models": []}]}, "runs: .*nothing to do"),
        ({"recipes": DENSE, "modles": MODELS}, "modles: unknown key; did you mean models?"),
        (
            {"recipes": {"dense": {"method": "nowag"}}, "calibrations": {"a": TEXT}},
            "recipes.dense: benchmarks call the model itself so",
        ),
        ({"recipes": DENSE, "evaluations": {"a": {"tasks": ["mmlu", "paper"]}}}, "tasks: mmlu, mmlu.*: each once"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(value, said):
    with pytest.raises(ArmorError, match=said):
        parse_settings(Config, {"models": MODELS} | value)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (BenchmarkSettings, {"clients": [1]}, "clients: goes with an engine"),
        (BenchmarkSettings, {"engine": "vllm", "batch_sizes": [2]}, "batch_sizes: goes without an engine"),
        (BenchmarkSettings, {"engine": "vlm"}, "'vlm' is unknown"),
        (EvaluationSettings, {**TEXT, "engine": "vllm"}, "engine: goes with tasks"),
        (EvaluationSettings, {"tasks": ["last_word"]}, "text: not given; last_word needs one"),
        (EvaluationSettings, {**PIQA, **TEXT}, "text and items go with last_word and continuation"),
        (EvaluationSettings, {**PIQA, "sequences": 3}, "sequences: goes with perplexity on a text"),
        (EvaluationSettings, {"tasks": ["$NOWHERE/a.yaml"]}, "environment variable in this path is not set"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(kind, settings, said):
    with pytest.raises(ArmorError, match=said):
        parse_settings(kind, settings)


def test_a_pattern_needs_no_quotes_though_yaml_reads_it_as_a_number_of_base_60():
    for text in ("1:2", "2:4", "4:8", "2:8"):
        found = yaml.safe_load(f"pattern: {text}")["pattern"]
        assert isinstance(found, int) and Recipe(pattern=found).pattern == text


def test_a_benchmark_behind_a_server_is_another_stage_of_the_recipes_that_ask_for_it():
    value = {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"armor": {}, "whole": {"method": "int8"}}}
    value |= {"benchmarks": {"decode": {}, "serve": {"engine": "vllm"}}}
    value |= {"runs": [{"benchmarks": ["decode"]}, {"recipes": ["armor"], "benchmarks": ["serve"]}]}
    config = parse_settings(Config, value)
    found = [(pair.recipe, pair.benchmarks, pair.serving) for pair in config.report_settings().pairs]
    assert found == [("armor", ["decode"], ["serve"]), ("whole", ["decode"], [])]
    assert config.served() == ["benchmarks.serve"] and config.benchmarked("tiny", "serve") == ["armor"]


def test_sparsegpt_needs_gram_matrices_in_an_override_too():
    recipe = {"overrides": [{"layers": [0], "method": "sparsegpt"}]}
    value = {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"mine": recipe}}
    with pytest.raises(ArmorError, match="recipes.mine: sparsegpt needs .* set calibrations.a.gram: true"):
        parse_settings(Config, value)
    parse_settings(Config, value | {"calibrations": {"a": TEXT | {"gram": True}}})


def test_a_layer_gets_the_overrides_that_concern_it_and_the_last_one_wins():
    overrides = [{"layers": [1], "block_size": 8}, {"modules": "*.q_proj", "pattern": "4:8"}, {"layers": [0, 1]}]
    recipe = {"block_size": 16, "overrides": overrides, "keep_dense": ["*.k_proj"]}
    config = parse_settings(Config, {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"mine": recipe}})
    for layer, block_size in ((0, 16), (1, 8), (2, 16)):
        settings = config.layer_settings("mine", layer)
        assert settings.for_module("x.q_proj").pattern == "4:8" and settings.for_module("x.v_proj").pattern == "2:4"
        assert settings.for_module("x.q_proj").block_size == block_size
        assert settings.for_module("x.k_proj").method == "dense"


def test_an_override_of_the_solver_changes_only_what_it_names():
    solver = {"algorithm": "published", "iterations": 20000}
    recipe = {"solver": solver, "overrides": [{"solver": {"iterations": 5}}]}
    config = parse_settings(Config, {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"mine": recipe}})
    passed_on = config.layer_settings("mine", 0).model_dump_json(exclude_none=True)  # as the workflow does
    found = parse_settings(LayerSettings, passed_on).for_module("x").solver
    assert found.algorithm == "published" and found.iterations == 5


def test_a_budget_leaves_alone_what_an_override_decides():
    overrides = [{"modules": "*.q_proj", "block_size": 8}, {"solver": {"iterations": 5}}]
    over = [{"block_size": 16}, {"pattern": "4:8"}, {"method": "wanda"}]
    recipe = {"overrides": overrides, "keep_dense": ["*.k_proj"], "budget": {"bits": 11.5, "over": over}}
    config = parse_settings(Config, {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"mine": recipe}})
    settings = parse_settings(PriceSettings, config.price_settings("mine", 0).model_dump_json(exclude_none=True))
    assert [choice.given() for choice in settings.choices("x.v_proj")] == over
    assert [choice.given() for name in "qk" for choice in settings.choices(f"x.{name}_proj")] == [{}, {}]
    assert settings.iterations == 30 and settings.solver.iterations == 300
    assert "armor.methods.wanda" in settings.code()  # what it may choose is among what it executes
    assert {*config.sensitivities()} == {"a-8xcontext"} and config.report_settings().pairs[0].block_size is None


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"overrides": [{"layers": [-1]}]}, "greater than or equal to 0"),
        ({"pattern": "3:2"}, "expected n:m"),
        ({"overrides": [{"solver": {"selection": "uniform"}}]}, "solver.selection: goes with algorithm: published"),
        ({"method": "dense", "budget": {"bits": 11.5}}, "budget: a dense recipe has none"),
        ({"gptq": {}}, "gptq: goes with the method gptq, which this recipe does not name"),
        ({"base": "nowag"}, "base: goes with refine, quantize or tune"),
        ({"base": "nowag", "method": "wanda", "tune": {}}, "method: is what the base says; leave it out"),
        ({"base": "mine", "tune": {}}, "base: mine -> mine: goes round in a circle"),
        ({"base": "none", "tune": {}}, "base: 'none' is not defined"),
        ({"base": "dense", "tune": {}}, "tune: a dense recipe has no factors"),
        ({"base": "int8", "tune": {}}, "base: int8 has int8's integers of whole weights"),
        ({"base": "rounded", "quantize": {}}, "quantize: rounded, from which it starts, is quantized already"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(recipe, said):
    others = {name: {"method": name} for name in ("dense", "nowag", "int8")}
    others["rounded"] = {"base": "nowag", "quantize": {}}
    value = {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": {"mine": recipe, **others}}
    with pytest.raises(ArmorError, match=f"recipes.mine.*{said}"):
        parse_settings(Config, value)


BOTH = {"files": ["words.txt", "more.txt"]}
WIKITEXT = {"dataset": "wikitext"}


@pytest.mark.parametrize(
    ("calibrated", "evaluated"),
    [
        (TEXT["text"] | {"documents": [0, 5]}, {"text": TEXT["text"] | {"documents": [4, None]}}),
        (BOTH, TEXT),  # the numbers count through all files
        (TEXT["text"], TEXT | {"tasks": ["last_word"]}),
        (TEXT["text"], {"text": {"files": [os.path.abspath("words.txt")]}}),
        (WIKITEXT | {"split": "train[:9%]"}, {"text": WIKITEXT | {"split": "test+train[9%:]"}}),
        ({"mixture": [WIKITEXT, TEXT["text"]]}, TEXT),
    ],
)
def test_a_recipe_that_trains_on_what_it_is_evaluated_on_is_refused(calibrated, evaluated):
    recipes = {"mine": {"method": "nowag", "refine": {}}, "later": {"base": "mine", "quantize": {}}}
    value = {"models": MODELS, "calibrations": {"a": {"text": calibrated}}, "recipes": recipes}
    value |= {"evaluations": {"here": evaluated}}
    for runs in ({}, {"runs": [{"recipes": ["later"]}]}):  # it is evaluated itself, or what starts from it
        with pytest.raises(ArmorError, match="recipes.mine.refine: trains on documents of evaluations.here"):
            parse_settings(Config, value | runs)


@pytest.mark.parametrize(
    ("calibrated", "evaluated"),
    [
        (BOTH | {"documents": [0, 5]}, BOTH | {"documents": [5, 9]}),
        (WIKITEXT | {"split": "train"}, WIKITEXT | {"split": "test"}),
    ],
)
def test_other_documents_of_a_text_may_be_trained_on(calibrated, evaluated):
    recipes = {"mine": {"method": "nowag", "refine": {}, "tune": {}}}
    value = {"models": MODELS, "calibrations": {"a": {"text": calibrated}}, "recipes": recipes}
    parse_settings(Config, value | {"evaluations": {"here": {"text": evaluated}}})


IN_TURN = {"mixture": [{"files": ["more.txt"]}, {"mixture": [TEXT["text"], {"dataset": "wikitext"}]}]}


@pytest.mark.parametrize(
    ("refine", "tune", "needed"),
    [
        ({"sequences": 252}, {}, 252),
        ({}, {}, None),  # what refine holds out, tune may learn from
        ({}, {"sequence_length": 480}, 274),  # 128 times 1,024 tokens
        ({}, {"calibration": "other"}, None),
        ({}, {"calibration": "in_turn"}, 4 * 128 - 2),  # a quarter of it
    ],
)
def test_what_is_held_out_was_learned_from_by_no_training_before(refine, tune, needed):
    texts = {"a": TEXT["text"], "other": {"files": ["more.txt"]}, "in_turn": IN_TURN}
    calibrations = {name: {"text": text, "sequence_length": 1024} for name, text in texts.items()}
    recipes = {
        "first": {"method": "nowag", "calibration": "a", "refine": refine},
        "second": {"base": "first", "quantize": {}},
        "third": {"base": "second", "tune": tune},
    }
    value = {"models": MODELS, "calibrations": calibrations, "recipes": recipes}
    if needed:
        said = f"recipes.third.tune.sequences: found 192, expected at least {needed}: what is held out after them, "
        with pytest.raises(ArmorError, match=f"{said}recipes.first.refine has learned from$"):
            parse_settings(Config, value)
        recipes["third"]["tune"] = tune | {"sequences": needed}
    parse_settings(Config, value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_dense": ["*.q_porj"]}, r"recipes.mine, model m: '\*.q_porj' matches no linear .* mean \*.q_proj?"),
        ({"overrides": [{"layers": [0, 2], "method": "dense"}]}, "overrides: layers: found 2, .* 0 to 1"),
        ({"quantize": {"overrides": [{"layers": [3]}]}}, "overrides: layers: found 3, but the model's are 0 to 1"),
        ({"quantize": {"overrides": [{"modules": "*.k_proj"}]}}, r"'\*.k_proj' matches no linear"),
    ],
)
def test_what_a_model_has_not_is_refused_with_the_nearest(changes, said):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    recipes = {"plain": {"keep_dense": ["*.q_proj"], "overrides": [{"layers": [1]}]}, "mine": changes}
    config = parse_settings(Config, {"models": MODELS, "calibrations": {"a": TEXT}, "recipes": recipes})
    config.check_model("plain", "m", names, 2)
    with pytest.raises(ArmorError, match=said):
        config.check_model("mine", "m", names, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"mixture": [TEXT["text"]]}, "text.mixture: List should have at least 2 items"),
        ({"mixture": [TEXT["text"], {}]}, "text.mixture.1: expected exactly one of dataset, files, package, mixture"),
        ({"mixture": SEVERAL, "documents": [0, 5]}, "text: documents: goes with each text of the mixture"),
        ({"mixture": [*SEVERAL, TEXT["text"]]}, "text: mixture: two of its texts share documents"),
    ],
)
def test_a_mixture_is_of_several_texts_which_have_their_own_settings(text, said):
    with pytest.raises(ArmorError, match=re.escape(said)):
        parse_settings(CalibrationSettings, {"text": text})


def test_a_mixture_is_known_by_its_texts_and_their_files_wherever_they_are():
    def mixture(*files):
        return TextSettings(mixture=[TextSettings(files=list(part)) for part in files])

    text = mixture(["a/one.txt", "a/two.txt"], ["a/three.txt"])
    assert text.called() == "one.txt, two.txt / three.txt in turn"
    assert text.local_files() == ["a/one.txt", "a/two.txt", "a/three.txt"]
    assert text.without_files() == mixture(["b/one.txt", "b/two.txt"], ["b/three.txt"]).without_files()
    assert text.without_files() != mixture(["a/one.txt"], ["a/two.txt", "a/three.txt"]).without_files()


def test_a_setting_that_is_not_given_is_not_passed_on_so_that_a_new_one_reruns_no_layer():
    passed_on = Recipe().for_layer(0).model_dump(mode="json", exclude_none=True)
    assert passed_on["solver"] == {"iterations": 300, "algorithm": "fast"}


def test_the_papers_tasks_have_their_shots_and_others_those_given():
    tasks = EvaluationSettings(tasks=["paper", "own/mine.yaml", "piqa"], shots=2)
    of_paper = {name: (name, shots) for name, shots in PAPER_TASKS.items()}
    assert asked_tasks(tasks) == of_paper | {"mine": ("own/mine.yaml", 2), "piqa": ("piqa", 2)}
    assert tasks.task_files() == ["own/mine.yaml"]
    value = {"models": MODELS, "recipes": {"dense": {"method": "dense"}}}
    config = parse_settings(Config, value | {"evaluations": {"a": TEXT, "b": {"tasks": ["piqa"]}}})
    pair = config.report_settings().pairs[0]
    assert (pair.evaluations, pair.tasks) == (["a"], {"b": ["piqa"]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipes:\n  a: {method: wanda}\n  b: {}\n  a: {}\n", "recipes.a: given on line 2 and again on line 4"),
        ("runs:\n- models: [a]\n- models: [a]\n  models: [b]\n", "runs.models: given on line 3 and again on line 4"),
        ("seed: 1\na: &a {b: {c: [1, *a]}}", "a.b.c: what begins on line 2 holds itself by an alias"),
        ("seed: 1\na: &a {<<: *a}", "a.<<: what begins on line 2 holds itself by an alias"),
    ],
)
def test_yaml_that_gives_a_key_twice_or_holds_itself_is_refused_with_its_line(tmp_path, text, said):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ArmorError) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}: {said}; ")


def test_merged_keys_of_yaml_may_be_given_again(tmp_path):
    (tmp_path / "my.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {d: {<<: *b, y: 4}}\n")
    assert read_yaml(tmp_path / "my.yaml")["b"] == {"x": 3, "y": 2}
