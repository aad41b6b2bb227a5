"""The configurations in config/: each passes `armor check` and is planned without weights, from outlines of its models.

A model is an outline with its real shapes, made here: safetensors files that are holes, so nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from armor.command.tools import check
from armor.config.loading import load_config
from armor.config.reading import parse_settings
from armor.config.run import Config
from armor.format.holes import Hole, write_holes
from armor.format.shards import DTYPES, SINGLE
from armor.plan.machine import CARDS, Host
from armor.plan.need import Plan
from armor.plan.subject import subject
from armor.plan.table import Planned, planned
from tests.tiny import tiny_tokenizer

CONFIG = Path(__file__).resolve().parents[2] / "config"
FILES = sorted(CONFIG.rglob("*.yaml"))
LAYERS = 2
"""Of the models where nothing else is said: all layers of one have the same shapes."""
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LLAMA_3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
TRAINED = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
MODELS = {
    "smollm2-135m": ("llama", {**SMOLLM2, "vocab_size": 49152, "tie_word_embeddings": True}),
    "gemma-3-270m": ("gemma3_text", {**GEMMA, "head_dim": 256, "vocab_size": 262144}),
    "llama-3-8b": ("llama", {**LLAMA_3, "vocab_size": 128256}),
    "qwen2.5-7b": ("qwen2", {**QWEN, "vocab_size": 152064}),
    "llama": ("llama", {**TRAINED, "vocab_size": 4096}),
}
"""The family and the sizes of each model in config/."""
ROOMY = Host(memory=10**12, disk=10**13, cores=8, gpu=80 * 10**9)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What the examples read: WikiText-2, the tasks of benchmarks.tasks, a folder with a model."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (folder / name).touch()
    for name in re.findall(r"\$TASKS/(\w+)\.yaml", (CONFIG / "examples/smollm2-tasks.yaml").read_text()):
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\noutput_type: multiple_choice\n")
    return folder


@pytest.fixture(autouse=True)
def places(data, monkeypatch) -> None:
    """Set the environment variables that the headers name."""
    for name in ("WIKITEXT2", "TASKS", "LLAMA"):
        monkeypatch.setenv(name, str(data))


def outline(folder: Path, family: str, dtype: str, **sizes) -> Path:
    """A folder of a model of `family` without its numbers."""
    config = AutoConfig.for_model(family, **{"num_hidden_layers": LAYERS, "max_position_embeddings": 8192, **sizes})
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys or ())
    code, width = next((code, width) for code, (name, width) in DTYPES.items() if name == dtype)
    holes = {n: Hole(code, t.shape, t.numel() * width) for n, t in model.state_dict().items() if n not in tied}
    config.save_pretrained(folder)
    write_holes(folder / SINGLE, holes)
    tiny_tokenizer(folder)
    return folder


def plan_of(content: dict, place: Path, models: dict, host: Host = ROOMY) -> tuple[Config, Planned]:
    """The configuration `content` with an outline in the place of each model, and its plan."""
    for name, settings in content["models"].items():
        family, sizes = models[name]
        folder = outline(place / "models" / name, family, settings.get("dtype", "bfloat16"), **sizes)
        content["models"][name] = {"folder": str(folder)}
    config = parse_settings(Config, content)
    subjects = {name: subject(config, name, place / "results") for name in content["models"]}
    return config, planned(Plan(config, subjects, host, CARDS["H100"]), place / "results", None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_passes_the_check(file, capsys):
    check([file])
    pairs = load_config(file).pairs()
    assert f"{file}: {len(pairs)} pairs of model and recipe" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_is_planned_without_weights(file, tmp_path):
    """Every recipe of it gets its size, none is larger than dense, and every job that makes one is counted."""
    config, plan = plan_of(yaml.safe_load(file.read_text()), tmp_path, MODELS)
    assert plan.problems == ()
    assert [(one.model, one.recipe) for one in plan.recipes] == list(config.pairs())
    bits = {one.recipe: one.bits_per_weight for one in plan.recipes}
    assert all(0 < bits[recipe] <= bits["dense"] for recipe in bits)
    jobs = Counter()
    for stage in plan.stages:
        jobs[stage.stage] += stage.jobs
    compressed = [pair for pair in config.pairs() if not config.is_dense(pair[1])]
    made = {(model, config.owner(recipe)) for model, recipe in compressed}
    assert jobs["factorize"] == LAYERS * len(made) and jobs["assemble"] == len(compressed)
    calibrated = {(model, config.calibration_of(recipe)) for model, recipe in compressed}
    assert jobs["calibrate"] == len(calibrated) and jobs["report"] == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_configuration_in_the_report_asks_for_the_same_again(file):
    config = load_config(file)
    text = yaml.safe_dump(config.report_settings().config)
    assert parse_settings(Config, yaml.safe_load(text)) == config
    explicit = parse_settings(Config, config.model_dump(mode="json"))  # defaults written out change nothing
    assert explicit.report_settings() == config.report_settings()


LLAMA_2 = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN_72 = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
LARGE = {
    "llama-3-8b": ("llama", 4096, {**LLAMA_2, "vocab_size": 32000, "num_hidden_layers": 80}),
    "qwen2.5-7b": ("qwen2", 8192, {**QWEN_72, "vocab_size": 152064, "num_hidden_layers": 80}),
}
"""The family, the tokens of a sequence and the sizes of the largest model that the header of an example names."""


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_of_a_family_fits_the_machine_that_the_header_names(name, tmp_path):
    family, length, sizes = LARGE[name]
    content = yaml.safe_load((CONFIG / f"examples/{name}.yaml").read_text())
    for key in ("evaluations", "benchmarks"):
        del content[key]
    del content["recipes"]["dense"]
    content["calibrations"]["c4"]["sequence_length"] = length
    host = Host(memory=64 * 10**9, disk=10**13, cores=8, gpu=80 * 10**9)
    _, plan = plan_of(content, tmp_path, {name: (family, sizes)}, host)
    assert plan.problems == ()
