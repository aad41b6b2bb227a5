"""The plan: its sizes are those of the real files, every stage has its needs, and what is too large is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from armor.config.reading import parse_settings
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.shards import Shards
from armor.plan.machine import CARDS, Host, card_named
from armor.plan.need import Plan
from armor.plan.needs import NEEDS, need
from armor.plan.subject import subject
from armor.plan.submitted import submitted
from armor.plan.table import planned, text
from armor.run.jobs import jobs
from armor.run.stages import STAGES
from tests.forks import armor
from tests.packed import SETTINGS, packed
from tests.tiny import tiny_model

CONFIG = {
    "calibrations": {"words": {"text": {"files": ["words.txt"]}, "sequences": 4, "sequence_length": 32}},
    "recipes": {
        "dense": {"method": "dense"},
        "armor": {"block_size": 16, "solver": {"iterations": 2}},
        "refined": {"base": "armor", "refine": {"steps": 2, "sequences": 2, "held_out": 1}},
        "tuned": {"base": "refined", "tune": {"steps": 2, "sequences": 2, "held_out": 1}},
        "integers": {"base": "refined", "quantize": {}, "tune": {"steps": 2, "sequences": 2, "held_out": 1}},
        "bits": {"block_size": 16, "budget": {"bits": 24.0, "over": [{"block_size": 8}, {"method": "nowag"}]}},
    },
    "evaluations": {
        "words": {"text": {"files": ["other.txt"]}, "sequences": 2, "sequence_length": 32},
        "reading": {"text": {"files": ["other.txt"]}, "tasks": ["last_word"]},
    },
    "benchmarks": {"decode": {}},
}
REPOSITORY = Path(__file__).resolve().parents[2]
SERVED = {
    "benchmarks": {"decode": {}, "serve": {"engine": "vllm"}},
    "runs": [{"benchmarks": ["decode"]}, {"recipes": ["armor"], "benchmarks": ["serve"]}],
}
ROOMY = Host(memory=10**12, disk=10**12, cores=2, gpu=None)


def made(folder, place, recipes=None, host=ROOMY, **edits):
    """The plan of the model in `folder`, its needs in full, and the folder with its topology."""
    config = CONFIG | {"models": {"tiny": {"folder": str(folder)}}} | edits
    config = parse_settings(Config, config | ({"recipes": recipes} if recipes else {}))
    plan = Plan(config, {"tiny": subject(config, "tiny", place)}, host, CARDS["H100"])
    return plan, planned(plan, place, None), place


@pytest.mark.parametrize(("family", "share"), [("llama", True), ("qwen2", False)])
def test_a_checkpoint_will_be_as_large_as_the_plan_says(tmp_path, family, share):
    root = packed(tmp_path, family, SETTINGS.model_copy(update={"share_right": share}))
    recipe = {"block_size": SETTINGS.block_size, "solver": {"iterations": 2}, "share_right": share}
    plan, found, _ = made(root / "source", tmp_path / "plan", {"armor": recipe})
    record, expected = CheckpointRecord.read(root / "checkpoint.json"), plan.subjects["tiny"].packed["armor"]
    assert found.recipes[0].bits_per_weight == record.bits_per_weight
    real, shards = Shards(root / "checkpoint"), Shards(expected.folder)
    assert {n: (real.shape(n), real.dtype(n)) for n in real.names()} == {
        n: (shards.shape(n), shards.dtype(n)) for n in shards.names()
    }
    assert found.recipes[0].weights_bytes == pytest.approx(sum(map(real.bytes_of, real.names())), rel=0.1)
    layers = [(root / f"layers/layer_{k}.safetensors").stat().st_size for k in range(2)]
    assert sum(s.kept_bytes for s in found.stages if s.stage == "factorize") == pytest.approx(sum(layers), rel=0.1)


def test_every_stage_has_its_needs(tmp_path):
    plan, found, place = made(tiny_model(tmp_path / "model", layers=2), tmp_path / "plan", **SERVED)
    assert NEEDS.keys() == STAGES.keys() == {"experts"} | {stage.stage for stage in found.stages}
    assert all(stage.host_bytes > 0 for stage in found.stages)
    assert sum(stage.jobs for stage in found.stages) == len(list(jobs(plan.config, str(place))))
    by_layer = {stage.stage: stage.jobs for stage in found.stages}
    assert by_layer["factorize"] == by_layer["refine"] == by_layer["price"] == 2
    computing = {stage.stage for stage in found.stages if stage.card_bytes}
    assert computing == set(STAGES) - {"fetch", "inspect", "experts", "assemble", "budget", "refined", "report"}
    assert found.problems == () and any("time of tasks" in note for note in found.notes)
    said = "\n".join(text(found, plan, bandwidth=None))
    assert "tiny bits" in said and "24.00" in said and "GPU: about" in said


def test_a_token_reads_the_experts_that_it_is_sent_to_and_a_budget_is_spent(tmp_path):
    mixture = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    plan, found, _ = made(tiny_model(tmp_path / "model", "qwen3_moe", layers=1, **mixture), tmp_path / "plan")
    by_recipe, subject = {one.recipe: one for one in found.recipes}, plan.subjects["tiny"]
    experts = sum(subject.shards.bytes_of(name) for name in subject.shards.names() if ".experts." in name)
    outside = sum(map(subject.shards.bytes_of, subject.shards.names())) - subject.table_bytes - experts
    assert by_recipe["dense"].bytes_per_token == outside + experts // 4
    spent = by_recipe["bits"].weights_bytes - by_recipe["armor"].weights_bytes
    bits = by_recipe["bits"].bits_per_weight - by_recipe["armor"].bits_per_weight
    assert by_recipe["bits"].bits_per_weight == 24.0
    assert spent == pytest.approx(bits * subject.topology.linear_parameters / 8, abs=16)


def test_a_budget_that_no_choices_come_to_is_refused(tmp_path):
    asked = {"bits": CONFIG["recipes"]["bits"] | {"budget": {"bits": 11.94}}}
    with pytest.raises(ArmorError, match="recipes.bits: budget.bits: found 11.94, but the choices in over take 17"):
        made(tiny_model(tmp_path / "model", layers=1), tmp_path / "plan", asked)


def test_a_large_mixture_is_planned_in_groups_of_experts(tmp_path):
    model = tiny_model(tmp_path / "model", "qwen3_moe", layers=1, num_experts=8, moe_intermediate_size=64)
    recipe = CONFIG["recipes"]["armor"]
    whole, cut = (
        {stage.stage: stage for stage in made(model, tmp_path / name, {"armor": recipe | more})[1].stages}
        for name, more in (("whole", {}), ("cut", {"experts_per_job": 3}))
    )
    assert "experts" not in whole and cut["experts"].jobs == 3 and cut["factorize"].jobs == 1
    assert max(cut["experts"].host_bytes, cut["factorize"].host_bytes) < whole["factorize"].host_bytes


def test_what_does_not_fit_is_said_with_what_would(tmp_path):
    plan, found, place = made(tiny_model(tmp_path / "model", layers=2), tmp_path / "plan")
    tuned = next(stage.card_bytes for stage in found.stages if (stage.stage, stage.of) == ("tune", "tiny tuned"))
    for of_host, job, told in (
        ({"disk": 1000}, "", "free; choose a folder on a larger disk with --directory"),
        ({"memory": 300 * 10**6}, "tune tiny tuned: ", "recipes.tuned.tune.core to false"),
        ({"memory": 700 * 10**6, "cores": 4}, "factorize tiny armor layer", "; use --cores 1"),
        ({"gpu": 1000}, "calibrate tiny words: ", "take a larger machine, for with calibrations.words.sequence_length"),
        ({"gpu": tuned - 1}, "tune tiny tuned: ", "; use --set-resources tune:gpu=2, set rec"),
    ):
        host = dataclasses.replace(ROOMY, **of_host)
        problems = planned(dataclasses.replace(plan, host=host), place, None).problems
        assert any(line.startswith(job) and told in line and "\n" not in line for line in problems), problems


def test_the_length_that_is_proposed_fits_and_twice_of_it_does_not(tmp_path):
    longer = {"words": CONFIG["calibrations"]["words"] | {"sequence_length": 128}}
    texts = {"words": CONFIG["evaluations"]["words"] | {"sequence_length": 128}}
    model = tiny_model(tmp_path / "model", layers=1)
    plan, _, place = made(model, tmp_path / "plan", calibrations=longer, evaluations=texts)
    for job in jobs(plan.config, place):
        if job.stage not in ("calibrate", "predict", "refine"):
            continue
        own = need(plan, job)
        assert own.by_length.length == 128 and own.by_length.memory(128) == own.memory
        between = [own.by_length.memory(length).card for length in (32, 64)]
        card = dataclasses.replace(plan, host=dataclasses.replace(ROOMY, gpu=sum(between) // 2))
        (said,) = (line for line in planned(card, place, None).problems if line.startswith(f"{job}: "))
        assert said.endswith(f"; lower {own.by_length.key} to 32")


def test_a_sequence_longer_than_the_context_and_an_unknown_card_are_refused(tmp_path):
    model = tiny_model(tmp_path / "model", layers=1)
    longer = {"words": CONFIG["calibrations"]["words"] | {"sequence_length": 4096}}
    with pytest.raises(ArmorError, match="words.sequence_length: found 4096, but tiny has a context of 128"):
        made(model, tmp_path / "plan", calibrations=longer)
    with pytest.raises(ArmorError, match="--card: 'abacus' is not known; expected one of H200, H100, A100-80GB"):
        card_named("abacus")


def test_the_command_prints_tables_and_leaves_nothing(tmp_path):
    tiny_model(tmp_path / "model", layers=1)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(CONFIG | SERVED | {"models": {"tiny": {"folder": "model"}}}))
    done = armor("plan", "my.yaml", "--threads", "1", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("tiny: llama, ") and "tiny armor" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "my.yaml"]


def test_what_is_submitted_is_what_the_profile_and_the_rules_ask(tmp_path):
    """Only Snakemake's own dry run shows what a profile and the rules ask for together."""
    model = tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(CONFIG | {"models": {"tiny": {"folder": str(model)}}}))
    for name in ("words.txt", "other.txt"):
        (tmp_path / name).write_text("words")
    small = {"set-resources": ["price:mem_mb=500"], "set-threads": ["calibrate=16"]}
    away = {"executor": "kubernetes", "default-storage-provider": "s3"}  # no plugin
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"jobs": 9} | away | small))
    done = armor("plan", tmp_path / "my.yaml", "--profile", tmp_path, "--json", "--threads", "1", folder=REPOSITORY)
    assert done.returncode == 1, done.stderr
    asked = {row["stage"]: row for row in json.loads(done.stdout)["submitted"]}
    assert asked["factorize"] | {"minutes": 0} == {
        **{"stage": "factorize", "jobs": 4, "cores": 1, "memory_bytes": 16 * 10**9, "minutes": 0, "gpus": 1}
    }
    assert asked["calibrate"]["cores"] == 16
    assert "price: a job asks for 0.5 GB and takes 1.99 GB; use --set-resources price:mem_mb=2000" in done.stderr
    with pytest.raises(ArmorError, match="--profile nowhere: snakemake --dry-run fails here: .*nowhere"):
        submitted([tmp_path / "my.yaml"], "nowhere", tmp_path)
