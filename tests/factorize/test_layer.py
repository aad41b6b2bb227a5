import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from armor.config.layers import LayerSettings, Override
from armor.core.errors import ArmorError
from armor.core.pattern import Pattern, is_nm
from armor.factorize.layer import factorize_layer, seed_of
from armor.factorize.quantize import quantize_layer
from armor.format.factors import read_factors
from armor.format.records.base import BlockSizes
from armor.format.records.layer import LayerRecord
from armor.format.shards import Shards
from armor.format.statistics import Statistics, write_statistics
from armor.methods import METHODS
from armor.methods.magnitude import magnitude
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
    assert record == LayerRecord.read(output.with_suffix(".json"))
    source, topology = opened(root)
    assert list(record.modules) == [linear.name for linear in topology.layers[1].linears]
    factors, header = read_factors(output)
    assert header["fingerprint"] == record.fingerprint == topology.fingerprint
    statistics = load_file(root / "calibration/layer_1.safetensors")
    for entry in record.modules.values():
        assert entry.method == "armor" and entry.pattern == "2:4" and entry.note is None
        assert entry.block_sizes == BlockSizes(left=16, right=16)
        assert entry.loss <= entry.start_loss and entry.seconds > 0
        assert entry.device == "cpu" and 0 < entry.peak_memory_bytes <= record.peak_memory_bytes
        losses = [loss for _, _, loss in entry.trace]
        assert losses == sorted(losses, reverse=True)
    # The loss in the JSON is that of the factors in the file.
    weight = Shards(source.path).read(f"{Q}.weight")
    objective = Objective.of(weight, statistics[f"{Q}.importance"])
    assert relative_loss(weight, objective, factors[Q]) == pytest.approx(record.modules[Q].loss, rel=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "nowag"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "50%"])
def test_pruning_keeps_the_weights_own_values(root, tmp_path, method, pattern):
    record = run(root, tmp_path / "layer_1.safetensors", LayerSettings(method=method, pattern=pattern))
    factors, _ = read_factors(tmp_path / "layer_1.safetensors")
    shards = Shards(opened(root)[0].path)
    for name, f in factors.items():
        assert f.left is None and f.right is None and is_nm(f.mask, Pattern.parse(pattern))
        assert torch.equal(f.core, shards.read(f"{name}.weight") * f.mask)
        entry = record.modules[name]
        assert entry.block_sizes is None and 0 < entry.start_loss <= entry.loss < 1
        assert method != "nowag" or entry.loss == entry.start_loss


def test_sparsegpt_takes_the_gram_matrices(root, tmp_path):
    settings, output = LayerSettings(method="sparsegpt"), tmp_path / "layer_1.safetensors"
    with pytest.raises(ArmorError, match="no Gram matrix of the input of .*; calibrate with gram: true"):
        run(root, output, settings)
    topology = opened(root)[1]
    features = {linear.name: linear.in_features for linear in topology.layers[1].linears}
    inputs = {name: Statistics(torch.ones(n), torch.eye(n), 8) for name, n in features.items()}
    write_statistics(tmp_path / "s.safetensors", inputs, {name: name for name in inputs}, topology.fingerprint)
    record = run(root, output, settings, statistics=tmp_path / "s.safetensors")
    assert {entry.method for entry in record.modules.values()} == {"sparsegpt"}
    # Inputs that do not depend on each other leave nothing to make up for: it is magnitude pruning.
    factors, weight = read_factors(output)[0], Shards(opened(root)[0].path).read(f"{Q}.weight")
    torch.testing.assert_close(factors[Q].core, magnitude(weight, torch.ones(weight.shape[1])).core)


@pytest.mark.parametrize("algorithm", ["fast", "published"])
def test_the_same_seed_gives_the_same_bytes(root, tmp_path, algorithm):
    settings = LayerSettings(method="armor", block_size=16, solver=SolverSettings(iterations=4, algorithm=algorithm))
    for name in "ab":
        run(root, tmp_path / f"{name}.safetensors", settings)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_rule_of_selection_reaches_the_published_optimiser(root, tmp_path):
    made = []
    for rule in (None, "l1-random", "l1-greedy"):
        solver = SolverSettings(iterations=4, algorithm="published", selection=rule)
        run(root, tmp_path / f"{rule}.safetensors", LayerSettings(method="armor", block_size=16, solver=solver))
        made.append((tmp_path / f"{rule}.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_seeds_are_the_same_on_every_machine_and_differ_between_linears():
    assert seed_of(0, Q) == 58741623088216072
    assert len({seed_of(seed, name) for seed in (0, 1) for name in (Q, Q.replace("q_proj", "k_proj"))}) == 4


def test_the_factors_have_the_dtype_of_the_weights(tmp_path):
    root = prepared(tmp_path, dtype=torch.bfloat16)
    run(root, tmp_path / "layer_1.safetensors", armor())
    tensors = load_file(tmp_path / "layer_1.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("core_mask")} == {torch.bfloat16}


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


def test_what_cannot_hold_the_pattern_stays_dense_with_a_warning(root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "armor"):
        record = run(root, tmp_path / "layer_1.safetensors", LayerSettings(method="nowag", pattern="2:12"))
    entry = record.modules[Q]
    assert entry.method == "dense" and "2:12" in entry.note
    assert any(Q in line and "stays dense" in line for line in caplog.messages)


def test_without_usable_blocks_it_prunes_with_a_warning(root, tmp_path, caplog):
    settings = LayerSettings(method="armor", block_size=3, solver=SolverSettings(iterations=2))  # below the 4 of 2:4
    with caplog.at_level(logging.WARNING, "armor"):
        record = run(root, tmp_path / "layer_1.safetensors", settings)
    entry = record.modules[Q]
    assert entry.method == "nowag" and entry.block_sizes is None and "64 x 64" in entry.note
    assert any(Q in line and "nowag" in line for line in caplog.messages)


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


def test_long_traces_are_thinned_and_keep_their_ends(root, tmp_path):
    settings = armor(250, overrides=[Override(method="dense"), Override(modules="*.q_proj", method="armor")])
    trace = run(root, tmp_path / "layer_1.safetensors", settings).modules[Q].trace
    assert len(trace) == 100 and trace[0][0] == 0 and trace[-1][0] == 250


def test_an_override_that_matches_nothing_is_refused(root, tmp_path):
    with pytest.raises(
        ArmorError, match=r"overrides: '\*.q_porj' matches no linear of the model; did you mean \*.q_proj"
    ):
        run(root, tmp_path / "layer_1.safetensors", armor(overrides=[Override(modules="*.q_porj", method="dense")]))
    assert not list(tmp_path.iterdir())


def broken_statistics(root, path, change, fingerprint=None):
    _, topology = opened(root)
    tensors = load_file(root / "calibration/layer_1.safetensors")
    inputs = {name.removesuffix(".importance"): Statistics(change(t), None, 10) for name, t in tensors.items()}
    users = {linear.name: group[0].name for group in topology.layers[1].groups() for linear in group}
    write_statistics(path, inputs, users, fingerprint or topology.fingerprint)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([2]), float("nan")), "importance holds NaN"),
        (lambda t: -t, "importance holds NaN, infinity or a negative"),
        (lambda t: t[:-4], r"importance of shape \(60,\), expected \(64,\)"),
    ],
)
def test_broken_statistics_are_refused(root, tmp_path, change, message):
    statistics = broken_statistics(root, tmp_path / "s.safetensors", change)
    with pytest.raises(ArmorError, match=message) as error:
        run(root, tmp_path / "layer_1.safetensors", armor(), statistics=statistics)
    assert "s.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "layer_1.safetensors").exists()


def test_statistics_of_another_model_are_refused(root, tmp_path):
    statistics = broken_statistics(root, tmp_path / "s.safetensors", lambda t: t, fingerprint="0" * 64)
    with pytest.raises(ArmorError, match="of another model"):
        run(root, tmp_path / "layer_1.safetensors", armor(), statistics=statistics)


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


def test_a_failed_run_leaves_no_old_json_beside_new_factors(root, tmp_path):
    output = tmp_path / "layer_1.safetensors"
    run(root, output, LayerSettings(method="nowag"))

    described = output.with_suffix(".json")
    described.unlink()
    described.mkdir()  # no record can be written there
    with pytest.raises(OSError):
        run(root, output, LayerSettings(method="magnitude"))
    assert not described.is_file()


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
    files = [tmp_path / device / "layer_1.safetensors" for device in records]
    assert files[0].read_bytes() == files[1].read_bytes()


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
