"""The speed of linears: each shape once, on the model's own weights, dense and packed in turn."""

import pytest
import torch

from armor.benchmark.linears import core_alone, linear_speeds, wrapped
from armor.benchmark.rounds import ratios, summary
from armor.config.layers import LayerSettings
from armor.execution.files import read_json
from armor.format.checkpoint import modules_of
from armor.format.records.benchmark import Runs
from armor.runtime.linear import ArmorLinear
from armor.runtime.load import load_model
from tests.packed import packed, quantized

ROUNDS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def models(root):
    return load_model(root / "source"), load_model(root / "checkpoint")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    root = packed(tmp_path_factory.mktemp("pruned"), settings=LayerSettings(method="magnitude"))
    return load_model(root / "source"), load_model(root / "checkpoint")


def blocks_of(model):
    return {name: t for name, t in model.named_parameters() if name.rpartition(".")[2].startswith(("left", "right"))}


@pytest.mark.parametrize(("fails", "integers"), [(False, True), (True, False)])
def test_the_core_is_alone_for_a_while_and_then_the_same_tensors_are_back(root, fails, integers):
    model = load_model(quantized(root) if integers else root / "checkpoint")
    before, linear = blocks_of(model), model.model.layers[1].mlp.down_proj
    x = torch.randn(3, linear.in_features)
    whole = linear(x)
    try:
        with core_alone(model) as alone:
            assert alone is model and blocks_of(model) == {} and wrapped(model) == []
            torch.testing.assert_close(linear(x), x @ linear.dense_core().T)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = blocks_of(model)
    assert list(after) == list(before) and len(after) == (4 if integers else 2) * 14
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(linear(x), whole)
    torch.testing.assert_close(whole, x @ linear.dense_weight().T)


def test_a_pruned_model_has_no_blocks_to_take_off(pruned):
    assert wrapped(pruned[1]) == []
    assert all(record.core_milliseconds is None for record in linear_speeds(*pruned, ROUNDS))


def test_every_shape_is_there_once_with_the_bytes_of_its_format(root, models):
    layouts = modules_of(read_json(root / "checkpoint" / "config.json")["quantization_config"])
    found = linear_speeds(*models, ROUNDS)
    assert [(r.out_features, r.in_features, r.count) for r in found] == [
        (64, 64, 4),  # query and output of two layers
        (32, 64, 4),
        (128, 64, 4),
        (64, 128, 2),
    ]
    assert sum(record.count for record in found) == len(layouts)
    for record in found:
        name = next(n for n, own in layouts.items() if own.shapes()["core_values"][0] == record.out_features)
        name = name if record.in_features == 64 else "model.layers.0.mlp.down_proj"
        packed_bytes = sum(t.numel() * t.element_size() for t in models[1].get_submodule(name).state_dict().values())
        dense_bytes = 4 * record.out_features * record.in_features
        assert record.theoretical_speedup == pytest.approx(dense_bytes / packed_bytes)
        dense = record.dense_milliseconds.runs
        assert len(dense) == len(record.core_speedup.runs) == ROUNDS
        assert record.speedup.runs == pytest.approx(
            [a / b for a, b in zip(dense, record.milliseconds.runs, strict=True)]
        )


def test_every_linear_runs_in_every_round_and_sides_take_turns(models):
    calls, has_blocks = [], []
    for side, model in zip(("dense", "packed"), models, strict=True):
        for name, linear in model.named_modules():
            if isinstance(linear, torch.nn.Linear) and "layers" in name:
                linear.register_forward_hook(lambda *_, side=side, name=name: calls.append((side, name)))
            if isinstance(linear, ArmorLinear):
                linear.register_forward_hook(lambda own, *_: has_blocks.append(own.left is not None))
    linear_speeds(*models, ROUNDS)
    turns = [calls[start : start + 14] for start in range(0, len(calls), 14)]  # one round is not timed
    assert [{side for side, _ in turn} for turn in turns] == [{"dense"}, {"packed"}] * 2 * (ROUNDS + 1)
    assert all(len({*turn}) == 14 for turn in turns)
    assert has_blocks == ([True] * 14 + [False] * 14) * (ROUNDS + 1)


def test_quartiles_are_those_of_the_runs():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]).quartiles == (2.0, 4.0)
    assert summary([7.0]) == Runs(median=7.0, quartiles=(7.0, 7.0), runs=(7.0,))
    assert ratios([2.0, 9.0], [1.0, 3.0]).median == 2.5
