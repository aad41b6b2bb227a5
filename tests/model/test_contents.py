"""The table of what decoder layers are made of: every weight is in it, and what stays dense has a reason."""

from __future__ import annotations

import logging

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from armor.core.errors import ArmorError
from armor.model.contents import Contents
from armor.model.inspect import inspect
from armor.model.source import open_source
from benchmarks.families import small_config
from tests.tiny import tiny_model


def told(caplog, folder, family, **config):
    tiny_model(folder / family, family, layers=2, **config)
    with caplog.at_level(logging.INFO, "armor"):
        inspect(open_source(folder / family), folder / "model.json")
    lines = [record.getMessage() for record in caplog.records]
    return lines, [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_dense_family_is_all_compressed_and_gives_no_warning(tmp_path, caplog):
    lines, warnings = told(caplog, tmp_path, "llama")
    assert warnings == [] and sum(line.endswith("compressed") for line in lines) == 7


def test_experts_are_one_kind_and_what_stays_dense_has_a_reason(tmp_path, caplog):
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    lines, warnings = told(caplog, tmp_path, "qwen2_moe", **mixture, shared_expert_intermediate_size=64)
    (row,) = [line for line in lines if line.startswith("mlp.experts.*.gate_proj")]
    assert row.endswith("compressed")
    assert any(line.startswith("mlp.shared_expert_gate") and line.endswith("dense: a router") for line in lines)
    assert any(line.startswith("mlp.gate ") and line.endswith("dense: a router") for line in lines)
    assert warnings == []


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.odd = nn.Linear(30, 10, bias=False), nn.Conv1d(10, 10, 7)


def test_the_largest_of_what_is_left_out_is_named():
    contents = Contents()
    contents.add(Layer(), {})
    assert contents.share() == pytest.approx(300 / 1010)
    warning = contents.warning()
    assert warning is not None and warning.startswith("29.7%") and "odd (69.3%)" in warning and "\n" not in warning


def test_a_family_whose_layers_take_no_hidden_states_first_is_refused_in_one_line(tmp_path):
    AutoModelForCausalLM.from_config(small_config("reformer")).save_pretrained(tmp_path / "model")
    said = "ReformerLayer: is called with prev_attn_output, hidden_states; expected .* not supported$"
    with pytest.raises(ArmorError, match=said) as caught:
        inspect(open_source(tmp_path / "model"), tmp_path / "model.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "model.json").exists()
