"""Refine: the output error of a layer, as stored, never rises on held-out text; whatever the family and the method."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.config.layers import LayerSettings
from armor.config.quantization import QuantizeSettings
from armor.core.errors import ArmorError
from armor.format.factors import read_factors, read_others
from armor.format.records.layer import LayerRecord
from armor.format.records.states import StatesRecord
from armor.format.shards import Shards
from armor.format.statistics import read_statistics
from armor.methods.solver.objective import Objective, relative_loss
from armor.runtime.load import load_model
from armor.training.refine import output_error
from armor.training.refined import sum_up
from armor.training.states import make_states
from tests.memory import NoRoom, card_of
from tests.packed import edit_tensors, factorized, opened, prepared, quantized
from tests.tiny import tiny_text
from tests.training.trained import ready, refined, sample, tuned

NEAR = 1e-2
"""How far a loss may be where layers before it made the states: by bfloat16 products where the processor has them."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"))


def assembled(root, refined_folder, output):
    """The checkpoint of refined layers, loaded by transformers."""
    assemble(*opened(root), refined_folder, output / "checkpoint.json")
    return load_model(output / "checkpoint", "float32")


def _note(seen, _, args, kwargs, out):
    seen.append((args, kwargs, out))


def errors(root, model):
    """Per layer, what its output misses on held-out rows, given the dense model's states."""
    tokens = load_file(root / "states/tokens.safetensors")["tokens"][6:8]
    dense = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    seen: list[tuple] = []
    for layer in dense.model.layers:
        layer.register_forward_hook(partial(_note, seen), with_kwargs=True)
    with torch.no_grad():
        dense(tokens, use_cache=False)
        calls = zip(model.model.layers, seen, strict=True)
        return [output_error(layer(*args, **kwargs), out).item() for layer, (args, kwargs, out) in calls]


def test_every_token_counts_alike_however_large():
    wanted, missed = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    assert output_error(1.1 * wanted, wanted).item() == pytest.approx(0.01)
    size = torch.rand(3, 5, 1) * 1000
    torch.testing.assert_close(
        output_error(wanted + missed, wanted), output_error(size * (wanted + missed), size * wanted)
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3"])
def test_the_output_error_falls_in_every_family_and_the_record_says_what_is_stored(tmp_path, family):
    root = ready(tmp_path, family)
    output, shards = root / "refined", Shards(root / "source")
    before = errors(root, assembled(root, root / "layers", tmp_path / "before"))
    records = [refined(root, k, output) for k in range(2)]
    model = assembled(root, output, tmp_path)
    for k, (record, old, new) in enumerate(zip(records, before, errors(root, model), strict=True)):
        start, (done,) = LayerRecord.read(root / f"layers/layer_{k}.json"), record.training
        assert record == LayerRecord.read(output / f"layer_{k}.json") and record.factorized == start.made_by
        assert done.start_loss == pytest.approx(old, rel=1e-4) and done.loss == pytest.approx(new, rel=1e-4)
        assert done.loss < done.start_loss
        factors, _ = read_factors(output / f"layer_{k}.safetensors")
        inputs = read_statistics(root / f"calibration/layer_{k}.safetensors")
        for name, entry in record.modules.items():
            weight = shards.read(f"{name}.weight")
            loss = relative_loss(weight, Objective.of(weight, inputs[name].importance), factors[name])
            assert entry.loss == pytest.approx(loss) == factors[name].loss
        others = read_others(output / f"layer_{k}.safetensors")  # norms and biases, in the place of the source's
        assert others.keys() == {*done.norms_and_biases} and all(f".{k}." in name for name in others)
        for name, tensor in others.items():
            assert model.state_dict()[name].equal(tensor) and not shards.read(name).equal(tensor)
    trained = sum(len(record.training[0].norms_and_biases) for record in records)
    assert verify(tmp_path / "checkpoint", root / "source").distance.trained_tensors == trained > 0


def test_pruned_layers_are_refined_too_and_keep_their_mask(root, tmp_path):
    factorized(root, LayerSettings(method="nowag"), "pruned")
    done = refined(root, 0, tmp_path, "pruned").training[0]
    assert done.loss < done.start_loss
    before, after = (read_factors(folder / "layer_0.safetensors")[0] for folder in (root / "pruned", tmp_path))
    for name, factors in after.items():
        assert factors.left is None and factors.right is None
        assert factors.mask.equal(before[name].mask) and not factors.core.equal(before[name].core)


def test_of_a_lora_the_pair_alone_is_trained(root, tmp_path):
    factorized(root, LayerSettings(method="lora", rank=4), "lora")
    output, shards = tmp_path / "refined", Shards(root / "source")
    records = [refined(root, k, output, "lora", core=False, norm_rate=0) for k in range(2)]
    before, after = (read_factors(folder / "layer_0.safetensors")[0] for folder in (root / "lora", output))
    for name, factors in after.items():
        assert factors.core.equal(before[name].core) and not before[name].up.any()
        assert factors.up.any() and not factors.down.equal(before[name].down)
    others = read_others(output / "layer_0.safetensors")
    assert others and all(tensor.equal(shards.read(name)) for name, tensor in others.items())
    for record, error in zip(records, errors(root, assembled(root, output, tmp_path)), strict=True):
        (done,) = record.training
        assert done.start_loss > done.loss == pytest.approx(error, rel=1e-4)


def test_integers_are_refined_as_they_are_stored(root, tmp_path):
    folder = quantized(root, QuantizeSettings(core="int4"), "int4").parent / "quantized"
    records = [refined(root, k, tmp_path, "int4/quantized", rate=1e-2) for k in range(2)]
    before, after = (read_factors(place / "layer_0.safetensors")[0] for place in (folder, tmp_path))
    for name, factors in after.items():
        assert factors.quantization == before[name].quantization and factors.mask.equal(before[name].mask)
        assert factors.core.dtype == factors.left.dtype == torch.int8
    plain = errors(root, load_model(root / "int4/checkpoint", "float32"))
    own = errors(root, assembled(root, tmp_path, tmp_path))
    for k, record in enumerate(records):
        (done,) = record.training
        assert done.rounded and done.loss < done.start_loss
        assert done.start_loss == pytest.approx(plain[k], rel=1e-4) and done.loss == pytest.approx(own[k], rel=1e-4)


def test_a_bfloat16_model_keeps_its_promise_as_it_is_stored(tmp_path):
    root = ready(tmp_path, dtype=torch.bfloat16)
    record = refined(root, 0, tmp_path / "refined")
    tensors = load_file(tmp_path / "refined/layer_0.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("core_mask")} == {torch.bfloat16}
    assert record.training[0].loss < record.training[0].start_loss


def test_compressed_inputs_are_those_of_the_refined_layers_before(tmp_path):
    """Of a family whose last layer also takes what an earlier one hands on."""
    root, output = ready(tmp_path, "hy_v4", layers=3), tmp_path / "refined"
    chain = [refined(root, k, output, inputs="compressed", steps=8) for k in range(3)]
    assert all(record.training[0].loss < record.training[0].start_loss for record in chain)
    assert chain[0].sha256 == refined(root, 0, tmp_path / "alone", steps=8).sha256  # nothing is before it
    assert sorted(file.suffix for file in output.iterdir()) == [".json"] * 3 + [".safetensors"] * 3
    # The start's error is that of the layers before, refined, and of the last one as it was.
    mixed = shutil.copytree(output, tmp_path / "mixed")
    for suffix in ("json", "safetensors"):
        shutil.copy(root / f"layers/layer_2.{suffix}", mixed)
    tokens = load_file(root / "states/tokens.safetensors")["tokens"][6:8]
    dense = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    seen: list[tuple] = []
    for model in (assembled(root, mixed, tmp_path), dense):
        model.model.layers[2].register_forward_hook(partial(_note, seen), with_kwargs=True)
        with torch.no_grad():
            model(tokens, use_cache=False)
    found, wanted = (out[0] if isinstance(out, tuple) else out for _, _, out in seen)
    assert output_error(found, wanted).item() == pytest.approx(chain[2].training[0].start_loss, rel=NEAR)


def test_a_layer_that_stays_dense_passes_through_and_a_whole_model_is_not_tuned(root, tmp_path):
    factorized(root, LayerSettings(method="dense"), "dense")
    record, file = refined(root, 0, tmp_path, "dense"), tmp_path / "layer_0.safetensors"
    assert record.training == () and record.factorized is not None
    assert load_file(file).keys() == read_others(file).keys()
    with pytest.raises(ArmorError, match="dense: all linears are dense, so there is nothing to tune; leave tune out"):
        tuned(root, tmp_path / "tuned", "dense")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: {"fingerprint": "0" * 64}, "states.json: of another model than .*; run armor states again"),
        (lambda made: {"sequences": 6}, "found 6 sequences, expected 8 with the held-out ones; run armor states"),
        (
            lambda made: {"made_by": made.replace(settings=made.settings | {"sequence_length": 12})},
            "of another text than is asked for; delete it",
        ),
    ],
)
def test_states_that_are_not_those_asked_for_are_refused(root, tmp_path, change, said):
    copy, states = shutil.copytree(root, tmp_path / "copy"), StatesRecord.read(root / "states.json")
    states.replace(**change(states.made_by)).write(copy / "states.json")
    with pytest.raises(ArmorError, match=said):
        refined(copy, 0, tmp_path)
    assert not [*tmp_path.glob("[.l]*")]


def test_what_is_missing_or_of_another_model_is_one_line(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "states")
    with pytest.raises(ArmorError, match="run armor states again"):
        refined(copy, 0, tmp_path)
    with pytest.raises(ArmorError, match="holds no refined layer; run armor refine first"):
        sum_up(tmp_path / "none", tmp_path / "refined.json")
    with pytest.raises(ArmorError, match="found .* tokens in 1 documents, needed 8000 x 48"):
        make_states(*opened(root), sample(root, 8000), tmp_path / "states.json")
    factorized(prepared(tmp_path / "other", seed=1))
    with pytest.raises(ArmorError, match="layers/layer_0.safetensors: factors of another model"):
        refined(root, 0, tmp_path, tmp_path / "other/layers")


def test_states_are_the_models_own(root):
    tokens = load_file(root / "states/tokens.safetensors")["tokens"]
    dense = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    with torch.no_grad():
        hidden = dense(tokens, output_hidden_states=True).hidden_states
    found = [load_file(root / f"states/layer_{k}.safetensors")["states"].squeeze(1) for k in range(3)]
    torch.testing.assert_close(found[0], hidden[0])
    torch.testing.assert_close(found[1], hidden[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.model.norm(found[2]), hidden[2], rtol=1e-4, atol=1e-5)


def test_a_disk_without_room_is_said_before_the_first_byte(root, tmp_path, monkeypatch):
    monkeypatch.setattr("armor.execution.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(ArmorError, match="hidden states need .* GB on this disk, 1e-06 GB are free"):
        make_states(*opened(root), sample(root), tmp_path / "states.json")
    with pytest.raises(ArmorError, match="the steps of a training need .* make room, or set core: false"):
        refined(root, 1, tmp_path)
    assert not any(tmp_path.iterdir())


def test_states_that_overflow_are_named_by_layer_and_sequence(tmp_path):
    too_large = partial(edit_tensors, change=lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e38))
    prepared(tmp_path, change=too_large)
    (tmp_path / "text.txt").write_text(tiny_text())
    with pytest.raises(ArmorError, match=r"model.layers.1: its output holds NaN or infinity on sequence 0; the"):
        make_states(*opened(tmp_path), sample(tmp_path), tmp_path / "states.json")


def test_a_device_that_is_too_small_is_one_line(root, tmp_path, monkeypatch):
    with (
        NoRoom(lambda name, _: name == "silu_backward"),
        pytest.raises(ArmorError, match="layers.1: out of memory on cpu; lower sequence_length, or give the job more"),
    ):
        refined(root, 1, tmp_path)
    card_of(monkeypatch, 1_000)
    with pytest.raises(ArmorError, match="model.layers.1: refining it on .* needs about"):
        refined(root, 1, tmp_path, device="cuda")
