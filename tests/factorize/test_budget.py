"""A budget is spent exactly as well as can be, what it says is what is stored, and a person may change it."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from armor.assemble.writer import assemble
from armor.config.budget import BudgetSettings, PriceSettings
from armor.config.layers import Choice, Override
from armor.config.sample import SensitivityJob
from armor.core.errors import ArmorError
from armor.factorize.budget import choose
from armor.factorize.layer import factorize_layer
from armor.factorize.prices import price_layer
from armor.format.records.budget import BudgetRecord, PricesRecord
from armor.methods.solver.settings import SolverSettings
from armor.training.sensitivity import measure_sensitivity
from tests.packed import opened
from tests.training.trained import ready, sample

OVER = [Choice(block_size=4), Choice(block_size=8), Choice(method="nowag"), Choice(method="dense")]
SETTINGS = PriceSettings(
    method="armor",
    block_size=16,
    solver=SolverSettings(iterations=5),
    overrides=[Override(modules="*.k_proj", method="dense"), Override(modules="*", solver={"iterations": 4})],
    over=[*OVER, Choice(block_size=9)],
    iterations=3,
)
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model with sensitivities and the prices of all layers."""
    root = ready(tmp_path_factory.mktemp("model"))
    measure_sensitivity(*opened(root), SensitivityJob(sample=sample(root, 2)), root / "words.json")
    for layer in range(2):
        priced(root, layer, root / "prices")
    return root


def priced(root, layer, folder, settings=SETTINGS):
    statistics = root / f"calibration/layer_{layer}.safetensors"
    return price_layer(*opened(root), layer, statistics, root / "words.json", settings, folder / f"layer_{layer}.json")


def chosen(root, folder, bits):
    return choose(root / "prices", BudgetSettings(bits=bits), folder / "budget.json")


def factorized(root, folder, layer=1):
    file = f"layer_{layer}.safetensors"
    where = folder / "layers" / file
    return factorize_layer(
        *opened(root), layer, root / "calibration" / file, SETTINGS, where, "cpu", folder / "budget.json"
    )


def test_prices_rise_with_bits_and_fall_with_cost(root):
    record = PricesRecord.read(root / "prices/layer_1.json")
    assert {*record.modules} == {linear.name for linear in opened(root)[1].layers[1].linears}
    for name, linear in record.modules.items():
        if name.endswith("k_proj"):  # an override decides
            assert [price.choice for price in linear.prices] == [{}] and linear.prices[0].bits == 32
            continue
        small, large, pruned, dense = linear.prices  # blocks of at most 9 are those of 8
        assert [price.choice for price in linear.prices] == [choice.given() for choice in OVER]
        assert pruned.bits == 17 < small.bits < large.bits < dense.bits == 32
        assert pruned.predicted_kl > large.predicted_kl > dense.predicted_kl == 0
    assert priced(root, 1, root / "again").content() == record.content()


def test_the_bits_are_those_of_the_checkpoint_and_the_solver_gets_the_recipes_iterations(root, tmp_path):
    record = chosen(root, tmp_path, 24)
    assert record == BudgetRecord.read(tmp_path / "budget.json") and 23 < record.bits <= 24
    layers = [factorized(root, tmp_path, layer) for layer in range(2)]
    for layer in layers:
        assert layer.made_by.inputs["budget"] == record.content()
        for name, entry in layer.modules.items():
            choice = record.modules[name].choice
            assert entry.method == choice.get("method", "dense" if name.endswith("k_proj") else "armor")
            if entry.block_sizes:
                assert entry.block_sizes.left == choice["block_size"] and entry.trace[-1][0] == 4
    done = assemble(*opened(root), tmp_path / "layers", tmp_path / "checkpoint.json")
    assert done.bits_per_weight == pytest.approx(record.bits)


def test_it_is_one_line_for_each_linear_and_may_be_edited(root, tmp_path):
    price = chosen(root, tmp_path, 24).modules[Q]
    file = tmp_path / "budget.json"
    before = file.read_text()
    lines = {line.split('"')[1]: line for line in before.splitlines() if ".layers." in line}
    assert list(lines) == sorted(linear.name for linear in opened(root)[1].linears())

    def edited(choice):
        file.write_text(before.replace(lines[Q], lines[Q].replace(json.dumps(price.choice), json.dumps(choice))))
        return factorized(root, tmp_path).modules[Q]

    entry = edited({"method": "wanda", "pattern": "1:4"})
    assert entry.method == "wanda" and entry.pattern == "1:4"
    with pytest.raises(ArmorError, match=f"budget.json: {Q}: .*block_sise: unknown key; did you mean block_size"):
        edited({"block_sise": 8})
    file.write_text(before.replace(lines[Q] + "\n", ""))
    with pytest.raises(ArmorError, match=f"has no choice for {Q}; run armor budget again"):
        factorized(root, tmp_path)


@pytest.mark.parametrize("bits", [16, 33])
def test_a_budget_that_cannot_be_met_says_what_can(root, tmp_path, bits):
    with pytest.raises(
        ArmorError, match=rf"bits: found {bits}, but the choices in over take 17\.\d+ to 32 bits"
    ) as said:
        chosen(root, tmp_path, bits)
    assert not list(tmp_path.iterdir())
    for limit in re.findall(r"take (.*) to (.*) bits per", str(said.value))[0]:
        chosen(root, tmp_path / limit, float(limit))


def test_no_prices_or_those_of_several_models_are_one_line(root, tmp_path):
    with pytest.raises(ArmorError, match="holds no prices; run armor price first"):
        choose(tmp_path, BudgetSettings(bits=20), tmp_path / "budget.json")
    assert not list(tmp_path.iterdir())
    copy = shutil.copytree(root / "prices", tmp_path / "prices")
    PricesRecord.read(copy / "layer_1.json").replace(fingerprint="f" * 64).write(copy / "layer_1.json")
    with pytest.raises(ArmorError, match="holds prices of several models; delete it, and run armor price again"):
        choose(copy, BudgetSettings(bits=20), tmp_path / "budget.json")


def test_more_bits_never_cost_more(root, tmp_path):
    costs = [chosen(root, tmp_path, bits).predicted_kl for bits in (19, 21, 24, 28, 32)]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0
