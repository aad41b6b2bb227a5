from dataclasses import replace

import pytest
import torch

from armor.config.layers import LayerSettings, Override
from armor.core.errors import ArmorError
from armor.factorize.layer import factorize_layer, seed_of
from armor.factorize.quantize import quantize_layer
from armor.format.factors import read_factors
from armor.format.records.base import BlockSizes
from armor.format.records.layer import LayerRecord
from armor.format.shards import Shards
from armor.format.statistics import Statistics, read_statistics, write_statistics
from armor.methods import METHODS
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.settings import SolverSettings
from tests.memory import NoRoom
from tests.packed import QUANTIZE, edit_tensors, opened, prepared

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("model"))


def run(root, output, settings, layer=1, statistics=None):
    return factorize_layer(
        *opened(root), layer, statistics or root / f"calibration/layer_{layer}.safetensors", settings, output
    )


def armor(iterations=3, **keys):
    return LayerSettings(method="armor", block_size=16, solver=SolverSettings(iterations=iterations), **keys)


def test_armor_ends_below_its_start_and_says_what_is_in_the_file(root, tmp_path):
    output = tmp_path / "layers/layer_1.safetensors"
    record = run(root, output, armor())
    assert record == LayerRecord.read(output.with_suffix(".json")) and "budget" not in record.made_by.inputs
    source, topology = opened(root)
    assert list(record.modules) == [linear.name for linear in topology.layers[1].linears]
    factors, header = read_factors(output)
    assert header["fingerprint"] == record.fingerprint == topology.fingerprint
    statistics, shards = read_statistics(root / "calibration/layer_1.safetensors"), Shards(source.path)
    for name, entry in record.modules.items():
        assert entry.method == "armor" and entry.pattern == "2:4" and entry.note is None
        assert entry.block_sizes == BlockSizes(left=16, right=16) and entry.device == "cpu"
        assert entry.loss <= entry.start_loss and 0 < entry.peak_memory_bytes <= record.peak_memory_bytes
        weight = shards.read(f"{name}.weight")
        objective = Objective.of(weight, statistics[name].importance)
        assert relative_loss(weight, objective, factors[name]) == pytest.approx(entry.loss, rel=1e-6)


def test_without_gram_matrices_a_method_that_needs_them_is_refused(root, tmp_path):
    with pytest.raises(ArmorError, match="no Gram matrix of the input of .*; calibrate with gram: true"):
        run(root, tmp_path / "layer_1.safetensors", LayerSettings(method="sparsegpt"))


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    for name in "ab":
        run(root, tmp_path / f"{name}.safetensors", armor())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_seeds_are_the_same_on_every_machine_and_differ_between_linears():
    assert seed_of(0, Q) == 58741623088216072
    assert len({seed_of(seed, name) for seed in (0, 1) for name in (Q, Q.replace("q_proj", "k_proj"))}) == 4


def test_overrides_and_dense_modules(root, tmp_path):
    overrides = [
        Override(modules="*.mlp.*", method="dense"),
        Override(modules="*.k_proj", method="wanda", pattern="1:4"),
        Override(modules="*.o_proj", block_size=32),
    ]
    record = run(root, tmp_path / "layer_1.safetensors", armor(overrides=overrides))
    modules = record.modules
    factors, _ = read_factors(tmp_path / "layer_1.safetensors")
    dense = {name for name, entry in modules.items() if entry.method == "dense"}
    assert dense == {name for name in modules if ".mlp." in name} == modules.keys() - factors.keys()
    assert all(modules[name].loss == 0 and modules[name].note is None for name in dense)
    assert modules["model.layers.1.self_attn.k_proj"].pattern == "1:4"
    assert modules["model.layers.1.self_attn.o_proj"].block_sizes == BlockSizes(left=32, right=32)


@pytest.mark.parametrize(
    ("settings", "method", "said"),
    [
        (LayerSettings(method="nowag", pattern="2:12"), "dense", "2:12"),
        (LayerSettings(method="armor", block_size=3), "nowag", "64 x 64"),  # below the 4 of 2:4
    ],
)
def test_what_cannot_be_done_as_asked_is_done_otherwise_with_a_warning(root, tmp_path, caplog, settings, method, said):
    entry = run(root, tmp_path / "layer_1.safetensors", settings).modules[Q]
    assert entry.method == method and entry.block_sizes is None and said in entry.note
    assert any(Q in line and method in line for line in caplog.messages)


def test_all_dense_needs_no_statistics(root, tmp_path):
    missing = tmp_path / "nothing.safetensors"
    record = run(root, tmp_path / "layer_1.safetensors", LayerSettings(method="dense"), statistics=missing)
    assert {entry.method for entry in record.modules.values()} == {"dense"}
    with pytest.raises(ArmorError, match="nothing.safetensors: no such file"):
        run(root, tmp_path / "layer_1.safetensors", armor(), statistics=missing)


def test_a_method_that_prunes_must_take_the_pattern(root, tmp_path, monkeypatch):
    """Else the plan and the report would count every weight as kept."""
    nowag = METHODS["nowag"]
    monkeypatch.setitem(METHODS, "nowag", replace(nowag, settings=()))
    with pytest.raises(ArmorError, match=r"nowag made a core of pattern 2:4, expected 1:1; its function must take"):
        run(root, tmp_path / "layer_1.safetensors", LayerSettings(method="nowag"))
    assert not list(tmp_path.iterdir())


def test_an_override_that_matches_nothing_is_refused(root, tmp_path):
    with pytest.raises(
        ArmorError, match=r"overrides: '\*.q_porj' matches no linear of the model; did you mean \*.q_proj"
    ):
        run(root, tmp_path / "layer_1.safetensors", armor(overrides=[Override(modules="*.q_porj", method="dense")]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "fingerprint", "said"),
    [
        (lambda t: t.index_fill(0, torch.tensor([2]), float("nan")), None, "importance holds NaN"),
        (lambda t: -t, None, "importance holds NaN, infinity or a negative"),
        (lambda t: t[:-4], None, r"importance of shape \(60,\), expected \(64,\)"),
        (lambda t: t, "0" * 64, "of another model"),
    ],
)
def test_statistics_that_are_broken_or_of_another_model_are_refused(root, tmp_path, change, fingerprint, said):
    found = read_statistics(root / "calibration/layer_1.safetensors")
    inputs = {name: Statistics(change(own.importance).clone(), None, 10) for name, own in found.items()}
    statistics = tmp_path / "s.safetensors"
    write_statistics(statistics, inputs, {name: name for name in inputs}, fingerprint or opened(root)[1].fingerprint)
    with pytest.raises(ArmorError, match=said) as error:
        run(root, tmp_path / "layer_1.safetensors", armor(), statistics=statistics)
    assert "s.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "layer_1.safetensors").exists()


def test_nan_in_a_weight_names_file_and_module_and_leaves_nothing(tmp_path):
    root, output = prepared(tmp_path), tmp_path / "layer_1.safetensors"
    source, topology = opened(root)
    edit_tensors(root / "source", lambda tensors: tensors[f"{Q}.weight"].view(-1)[7:9].fill_(float("nan")))
    with pytest.raises(ArmorError, match=rf"model.safetensors: {Q}.weight: 2 of 4096 weights are NaN"):
        factorize_layer(source, topology, 1, root / "calibration/layer_1.safetensors", armor(), output)
    assert not list(tmp_path.glob("layer_1.*"))
    with pytest.raises(ArmorError, match="not the model that was inspected"):
        run(root, output, armor())


def test_a_layer_that_is_not_there(root, tmp_path):
    with pytest.raises(ArmorError, match="layer 7: the model has layers 0 to 1"):
        run(root, tmp_path / "layer_7.safetensors", armor(), layer=7)


def test_what_the_gpu_has_no_memory_for_is_left_to_the_cpu(root, tmp_path):
    """The device "meta" stands in for a GPU, one without room for anything."""
    statistics = root / "calibration/layer_1.safetensors"
    records = {}
    for device in ("cpu", "meta"):
        output = tmp_path / device / "layer_1.safetensors"
        with NoRoom(lambda _, result: result.is_meta) as gpu:
            records[device] = factorize_layer(*opened(root), 1, statistics, armor(), output, device)
    assert {entry.device for record in records.values() for entry in record.modules.values()} == {"cpu"}
    assert gpu.failed == len(records["meta"].modules)
    assert all("the GPU had too little memory" in entry.note for entry in records["meta"].modules.values())
    files = [(tmp_path / device / "layer_1.safetensors").read_bytes() for device in records]
    assert files[0] == files[1]


def test_no_memory_anywhere_names_the_module_and_keeps_what_is_finished(root, tmp_path):
    def is_weights_mask(_, tensor):
        return tensor.dtype == torch.bool and tensor.shape == (64, 64)

    place = rf"model.safetensors: {Q}.weight: out of memory on cpu; give the job more"
    with NoRoom(is_weights_mask, as_on_a_gpu=False), pytest.raises(ArmorError, match=place):
        run(root, tmp_path / "layer_1.safetensors", armor())
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_not_rounded_to(root, tmp_path):
    run(root, own := tmp_path / "layer_1.safetensors", LayerSettings(method="nowag"))
    other, statistics = prepared(tmp_path / "other", seed=1), root / "calibration/layer_1.safetensors"
    output = tmp_path / "rounded/layer_1.safetensors"
    with pytest.raises(ArmorError, match="not the model that was inspected"):
        quantize_layer(opened(other)[0], opened(root)[1], 1, own, statistics, QUANTIZE, output)
    assert not output.parent.exists()
