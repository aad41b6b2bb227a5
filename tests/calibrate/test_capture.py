"""Calibration: streamed statistics are those of plain hooks on the whole model, for every family and any memory."""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor.calibrate.capture import _embed, _run_layer, calibrate, peak_bytes
from armor.config.sources import CalibrationSettings, TextSettings
from armor.core.errors import ArmorError
from armor.execution.machine import peak_memory_bytes
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.topology import Topology
from armor.format.shards import SINGLE, Shards
from armor.format.statistics import read_statistics
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.runtime.apart import Whole
from armor.runtime.filling import load_layer, load_outside, unload_outside
from armor.runtime.skeleton import open_skeleton
from armor.text.blocks import token_blocks
from tests.memory import TOLD, NoRoom, card_of, forget_peak, held_bytes, printed_last
from tests.packed import edit_tensors
from tests.tiny import tiny_model, tiny_text

COUNT, LENGTH = 5, 48  # longer than the sliding windows


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text())
    return TextSettings(files=[str(tmp_path / "text.txt")])


def inspected(folder, output):
    """The source and topology of the model in `folder`; model.json goes beside `output`."""
    source = open_source(folder)
    inspect(source, output.parent / "model.json")
    return source, Topology.read(output.parent / "model.json")


def run(folder, text, output, **settings):
    source, topology = inspected(folder, output)
    settings = {"sequences": COUNT, "sequence_length": LENGTH} | settings
    return calibrate(
        source, topology, CalibrationSettings(text=text, **settings), output / "calibration.json"
    ), topology


def hooked(folder, text, dtype, count=COUNT, length=LENGTH):
    """Mean x² and mean x xᵀ of every linear, in float64, by hooks on the whole model; the slow twin."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    blocks = token_blocks(text, AutoTokenizer.from_pretrained(folder), count, length)
    seen: dict[str, list] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            seen[name] = []
            module.register_forward_pre_hook(
                lambda _, args, kept=seen[name]: kept.append(args[0].double().flatten(0, -2))
            )
    with torch.no_grad():
        for block in blocks:
            model(block.unsqueeze(0))
    inputs = {name: torch.cat(kept) for name, kept in seen.items()}
    return {name: (x.square().mean(0), x.T @ x / len(x)) for name, x in inputs.items()}


def close(a, b, tolerance=1e-5):
    return (a.double() - b).norm() <= tolerance * b.norm() and torch.allclose(a.double(), b, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "hy_v4"])
def test_statistics_are_those_of_hooks_on_the_whole_model(tmp_path, text, family):
    folder = tiny_model(tmp_path / "model", family, layers=3, max_shard_size="150KB")
    value, topology = run(folder, text, tmp_path / "calibration", gram=True)
    names = open_skeleton(folder, torch.float32).names
    expected = {names.saved_module(name): sums for name, sums in hooked(folder, text, torch.float32).items()}
    found = {}
    for k in range(3):
        found |= read_statistics(tmp_path / "calibration" / f"layer_{k}.safetensors", topology.fingerprint)
    assert set(found) == set(expected) == {linear.name for linear in topology.linears()}
    for name, (importance, gram) in expected.items():
        own = found[name]
        assert own.tokens == COUNT * LENGTH == value.tokens and own.importance.dtype == own.gram.dtype == torch.float32
        assert close(own.importance, importance), name
        assert (own.gram.double() - gram).norm() <= 1e-5 * gram.norm(), name


def test_inputs_that_are_shared_are_stored_once_and_the_same_run_gives_the_same_bytes(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=2)
    first, topology = run(folder, text, tmp_path / "a")
    inputs = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = {f"model.layers.1.{name}.importance" for name in inputs}
    assert set(load_file(tmp_path / "a/layer_1.safetensors")) == names
    second, _ = run(folder, text, tmp_path / "b")
    assert first.files == second.files and first.text_fingerprint == second.text_fingerprint
    assert sorted(first.files) == ["layer_0.safetensors", "layer_1.safetensors"]
    assert (
        first == CalibrationRecord.read(tmp_path / "a/calibration.json") and first.fingerprint == topology.fingerprint
    )
    third, _ = run(folder, text, tmp_path / "b", sequence_length=40)
    assert third.text_fingerprint != first.text_fingerprint


def test_spilled_hidden_states_change_nothing_and_leave_nothing(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=2)
    whole, _ = run(folder, text, tmp_path / "whole")
    assert whole.spilled_bytes == 0
    half = whole.hidden_states_bytes / 2e9
    spilled, _ = run(folder, text, tmp_path / "spilled", hidden_states_memory_gb=half)
    assert spilled.files == whole.files and spilled.spilled_bytes > 0
    names = sorted(path.name for path in (tmp_path / "spilled").iterdir())
    assert names == ["calibration.json", "layer_0.safetensors", "layer_1.safetensors"]


def test_the_sequence_length_is_the_context_length_unless_given(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=1, max_position_embeddings=32)
    value, _ = run(folder, text, tmp_path / "a", sequence_length=None)
    assert value.length == 32 and value.tokens == 32 * COUNT
    with pytest.raises(ArmorError, match="sequence_length: found 33, but the context length of .* is 32"):
        run(folder, text, tmp_path / "b", sequence_length=33)
    with pytest.raises(ArmorError, match=f"text.txt: found .* tokens in 1 documents, needed 999 x 32 = {999 * 32}"):
        run(folder, text, tmp_path / "c", sequence_length=None, sequences=999)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("model.layers.1.mlp.up_proj.weight", math.nan), ("model.embed_tokens.weight", math.inf)]
)
def test_bad_weights_are_named_with_their_file(tmp_path, text, name, value):
    folder = tiny_model(tmp_path / "model", layers=2)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(ArmorError, match=f"{SINGLE}: {name} holds NaN or infinity") as caught:
        run(folder, text, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/calibration.json").exists()


def test_activations_that_overflow_are_named_by_module(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=2)

    def enlarge(tensors):
        for name in ("gate", "up"):
            tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= 1e25

    edit_tensors(folder, enlarge)
    with pytest.raises(ArmorError, match=r"model\.layers\.1\.mlp\.down_proj: its input holds NaN or infinity"):
        run(folder, text, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == [".calibration.json.part", "layer_0.safetensors"]  # what is finished, for the next run


def test_a_device_with_too_little_memory_is_named_with_the_layer(tmp_path, text):
    """There is no room for a tensor of the shape that weights of a decoder layer alone have."""
    folder = tiny_model(tmp_path / "model", layers=2)
    said = r"model: model\.layers\.0: out of memory on cpu; lower sequence_length, or give the job more"
    with NoRoom(lambda name, x: (name, x.shape) == ("aminmax", (128, 64))), pytest.raises(ArmorError, match=said):
        run(folder, text, tmp_path / "out")


def test_another_model_than_the_inspected_one_is_refused(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=1)
    _, topology = inspected(folder, tmp_path / "out")
    other = open_source(tiny_model(tmp_path / "other", layers=1, seed=1))
    settings = CalibrationSettings(text=text, sequences=2, sequence_length=16)
    with pytest.raises(ArmorError, match="not the model that was inspected"):
        calibrate(other, topology, settings, tmp_path / "out/calibration.json")


def test_weights_of_one_layer_are_in_memory_at_a_time_and_never_the_head(tmp_path, text):
    folder = tiny_model(tmp_path / "model", layers=4)
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))  # refused if it were read
    source, topology = inspected(folder, tmp_path / "out")
    settings = CalibrationSettings(text=text, sequences=COUNT, sequence_length=LENGTH)
    layers: list[nn.Module] = []
    others = {id(each) for each in decoder_layers()}

    def look(module: nn.Module, _: tuple) -> None:
        if type(module).__name__ == "LlamaDecoderLayer" and not any(module is layer for layer in layers):
            layers.append(module)
            alive = [layer for layer in decoder_layers() if id(layer) not in others]
            real = [layer for layer in alive if not all(tensor.is_meta for tensor in layer.state_dict().values())]
            assert len(alive) == 4 and len(real) == 1 and real[0] is module

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        calibrate(source, topology, settings, tmp_path / "out/calibration.json")
    finally:
        hook.remove()
    assert len(layers) == 4


def decoder_layers():
    """Those that are in this process."""
    return [each for each in gc.get_objects() if type(each).__name__ == "LlamaDecoderLayer"]


@TOLD
@pytest.mark.parametrize("gram", [False, True])
def test_the_estimate_is_within_a_fifth_of_what_is_measured(tmp_path, gram):
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "max_position_embeddings": 2048}
    small = tiny_model(tmp_path / "small", layers=1, max_position_embeddings=2048)
    large = tiny_model(tmp_path / "large", layers=1, **size)
    steps = tmp_path / "steps"
    steps.mkdir()
    tokens = torch.arange(2048).view(1, 2048) % 250

    def measure():
        for folder in (small, large):  # a small model first, so that libraries are loaded
            layer = inspected(folder, folder)[1].layers[0]
            shards, skeleton = Shards(folder), open_skeleton(folder, torch.float32)
            load_outside(skeleton, shards)
            with _embed(skeleton, tokens, 1e9, steps, 0) as (hidden, calls):
                unload_outside(skeleton)
                before = held_bytes()
                forget_peak()
                runner, own = Whole(load_layer(skeleton, 0, shards, "cpu")), [of[0] for of in calls]
                _run_layer(runner, layer, partial(skeleton.inside, 0), own, hidden, gram, "cpu")
                print(peak_memory_bytes() - before)

    estimate = peak_bytes(inspected(large, large)[1], 2048, torch.float32, gram)
    assert estimate == pytest.approx(printed_last(measure), rel=0.2)


def test_a_device_too_small_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = tiny_model(tmp_path / "model")
    source, topology = inspected(folder, tmp_path / "out")
    needed = peak_bytes(topology, LENGTH, torch.float32, False)
    card_of(monkeypatch, needed - 1)
    absent = TextSettings(files=[str(tmp_path / "absent.txt")])
    settings = CalibrationSettings(text=absent, sequences=COUNT, sequence_length=LENGTH)
    said = f"{folder}: one decoder layer and a sequence of {LENGTH} tokens need about .* GB, cuda:0 has .* lower"
    with pytest.raises(ArmorError, match=said):
        calibrate(source, topology, settings, tmp_path / "out/calibration.json", "cuda:0")
    assert not (tmp_path / "out").exists()
