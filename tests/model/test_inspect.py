"""Inspect: the decoder layers and linears of every family, and inputs that are shared because they were seen to be."""

from __future__ import annotations

import json
from collections import UserDict

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from armor.core.errors import ArmorError
from armor.format.records.topology import Topology
from armor.model.by_hand import check_linears
from armor.model.inspect import input_groups, inspect
from armor.model.source import open_source
from armor.runtime.calls import Call, observe
from armor.runtime.skeleton import Skeleton
from tests.packed import edit_tensors
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_decoder_layer_is_found(tmp_path, family):
    folder = tiny_model(tmp_path / "model", family, layers=3, max_shard_size="150KB")
    inspect(open_source(folder), tmp_path / "model.json")
    topology = Topology.read(tmp_path / "model.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    assert {linear.name for linear in topology.linears()} == set(expected)
    for linear in topology.linears():
        module = expected[linear.name]
        assert (linear.out_features, linear.in_features) == tuple(module.weight.shape)
        assert linear.bias == (module.bias is not None) and linear.dtype == "float32"
        assert (folder / linear.shard).is_file()
    assert len(topology.layers) == 3 and topology.context_length == 128 and topology.hidden_size == 64
    assert topology.parameters == sum(p.numel() for p in model.parameters())
    assert topology.linear_parameters == sum(m.weight.numel() for m in expected.values())
    assert topology.tied_embeddings == model.config.tie_word_embeddings
    assert topology.fingerprint == open_source(folder).fingerprint
    groups = {tuple(sorted(linear.name.split(".")[-1] for linear in group)) for group in topology.layers[1].groups()}
    if family == "phi3":
        assert groups == {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)}
    else:
        assert groups == {("k_proj", "q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_models_that_cannot_be_compressed_are_named(tmp_path):
    bare = nn.ModuleList([nn.LayerNorm(4)])
    with pytest.raises(ArmorError, match="here: the decoder layers of ModuleList hold no linear; nothing to compress"):
        check_linears(bare, bare, "here")
    folder = tiny_model(tmp_path / "moe", "qwen3_moe", layers=1)
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ArmorError, match=r"has no tensor model.layers.0.mlp.experts.3.up_proj.weight"):
        inspect(open_source(folder), tmp_path / "b.json")
    folder = tiny_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(ArmorError, match="config.json: model_type nonsense is no family of transformers") as caught:
        inspect(open_source(folder), tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ArmorError, match=r"has shape \(128, 64\), expected \(96, 64\)"):
        inspect(open_source(folder), tmp_path / "d.json")
    assert not list(tmp_path.glob("*.json"))


class Layer(nn.Module):
    """Four linears whose inputs are: x, a view of x, x again after it was written to, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x, **kwargs):
        x = x * 2
        y = self.a(x) + self.b(x.view(-1, 4)).view(x.shape)
        return self.d(y + self.c(x.add_(1)))


def test_inputs_are_shared_when_they_are_the_same_data():
    layer = Layer().to("meta")
    names = {f"layers.0.{name}": linear for name, linear in layer.named_children()}
    assert input_groups(layer, torch.zeros(1, 3, 4), Call((), {}), "layers.0", names) == {
        "layers.0.a": 0,
        "layers.0.b": 0,
        "layers.0.c": 1,
        "layers.0.d": 2,
        "layers.0.unused": 3,
    }


class Between(nn.Module):
    """A model that scales the hidden states between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) * 0.5
        return x


class Pair(Layer):
    """Returns something behind the hidden states."""

    def forward(self, x, told=None):
        return super().forward(x), x * 2


class Ignoring(Between):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x, _ = layer(x)
        return x


class Wanting(Pair):
    def forward(self, x, told=None):
        x, _ = super().forward(x if told is None else x + told)
        return x, told  # handed on as it came


class Passing(Pair):
    def forward(self, x, told=None):
        return super().forward(x)[0], told


class Taking(Between):
    """The last layer computes with what the first one made, and the second hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Passing(), Wanting()])

    def forward(self, input_ids, use_cache):
        x, told = self.embed(input_ids), None
        for layer in self.layers:
            x, told = layer(x, told=told)
        return x


class Talkative(Layer):
    """Puts what it makes into what it is handed."""

    def forward(self, x, shared):
        if isinstance(shared, list):
            shared.append(x * 2)
        else:
            x = x + shared.get("keys", 0)
            shared["keys"] = x * 2
        return super().forward(x)


class Talking(Between):
    def __init__(self, container=UserDict) -> None:
        super().__init__()
        self.layers, self.container = nn.ModuleList([Talkative(), Talkative(), Talkative()]), container

    def forward(self, input_ids, use_cache):
        x, shared = self.embed(input_ids), self.container()
        for layer in self.layers:
            x = layer(x, shared)
        return x


def test_a_layer_that_must_see_numbers_is_followed_on_zeros_and_its_router_stays_dense(tmp_path):
    folder = tiny_model(tmp_path / "m", "jetmoe", layers=2, num_local_experts=4, kv_channels=16)
    topology = inspect(open_source(folder), tmp_path / "model.json")
    names = [linear.name for linear in topology.linears()]
    assert names == [f"model.layers.{k}.self_attention.kv_proj" for k in range(2)]


@pytest.mark.parametrize(
    ("kind", "carried"),
    [
        (Ignoring, [0, 0]),
        (Taking, [0, 1, 1]),
        (Talking, [0, 1, 1]),
    ],
)
def test_what_a_layer_makes_is_carried_until_the_last_layer_that_computes_with_it(kind, carried):
    model = kind()
    skeleton = Skeleton(model, model.layers, "layers")
    for length in (3, 5):  # what is known of the layers from the first time serves for other lengths
        tokens = torch.arange(length).remainder(9)[None]
        hidden, calls = observe(skeleton, tokens)
        assert [len(call.carried) for call in calls] == carried
        state = (hidden,)
        with torch.no_grad():
            for layer, call in zip(model.layers, calls, strict=True):
                state = call.run(layer, state)
            assert len(state) == 1 and torch.equal(state[0], model(tokens, False))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Between(), r"layers\.1: Between does not simply pass hidden states"),
        (Talking(list), r"Talkative: puts something for later layers into a list"),
    ],
)
def test_layers_that_talk_by_other_ways_are_refused(model, said):
    with pytest.raises(ArmorError, match=said):
        observe(Skeleton(model, model.layers, "layers"), torch.zeros(1, 3, dtype=torch.int64))
