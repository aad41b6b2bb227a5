import json
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import armor.runtime.quantizer
from armor.assemble.verify import verify
from armor.core.errors import ArmorError
from armor.runtime.linear import ArmorLinear
from tests.packed import DEFECTS, edit_tensors, factors_of, packed, quantized
from tests.tiny import FAMILIES

TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder, kind=AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, **options)


def dense(root, kind=AutoModelForCausalLM):
    """The source model with every W replaced by A·S·B."""
    model = kind.from_pretrained(root / "source")
    for name, factors in factors_of(root).items():
        name = name if kind is AutoModelForCausalLM else name.removeprefix("model.")
        model.get_submodule(name).weight.data = factors.reconstruct()
    return model


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=TOKENS, **options)[0]


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model_with_the_product(tmp_path, family):
    root = packed(tmp_path, family)
    model = load(root / "checkpoint")
    assert sum(isinstance(module, ArmorLinear) for module in model.modules()) == len(factors_of(root))
    assert close(logits(model), logits(dense(root)))


def test_a_classifier_gets_a_new_head_and_keeps_the_rest(root):
    model = load(root / "checkpoint", AutoModelForSequenceClassification, num_labels=3)
    with torch.no_grad():
        assert close(model.model(TOKENS)[0], dense(root, AutoModel)(TOKENS)[0])


def test_any_dtype(tmp_path):
    root = packed(tmp_path, dtype=torch.bfloat16)
    for dtype, tolerance in (("auto", 5e-2), (torch.float16, 5e-2), (torch.float32, 1e-4)):
        model, wanted = load(root / "checkpoint", dtype=dtype), torch.bfloat16 if dtype == "auto" else dtype
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.uint8 if name.endswith("core_mask") else wanted), name
        assert close(logits(model).float(), logits(dense(root).float()), tolerance)


def test_generation_with_every_cache_says_the_same(root):
    model = load(root / "checkpoint")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    expected = dense(root).generate(TOKENS, **options, return_dict_in_generate=True, output_logits=True)
    first, second = torch.stack(expected.logits).topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-3 * first.abs().max()  # rounding changes no choice
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(TOKENS, **options, **cache), expected.sequences), cache


@pytest.mark.parametrize(("kind", "size"), [(AutoModelForCausalLM, "5GB"), (AutoModel, "100KB")])
def test_save_pretrained_and_back(root, tmp_path, kind, size):
    model = load(root / "checkpoint", kind)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert verify(tmp_path).compressed_count == 14 and not verify(tmp_path).checksums
    again = load(tmp_path, kind)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if size == "5GB":
        assert (tmp_path / "model.safetensors").read_bytes() == (root / "checkpoint/model.safetensors").read_bytes()
    else:  # saved without the prefix, it is still a language model's body
        body = load(tmp_path, AutoModelForSequenceClassification).model
        assert close(logits(body), logits(dense(root, AutoModel)))


def test_dequantize_gives_a_dense_model(root, tmp_path):
    model = load(root / "checkpoint").dequantize()
    assert not any(isinstance(module, ArmorLinear) for module in model.modules())
    assert close(logits(model), logits(dense(root)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert close(logits(load(tmp_path)), logits(model))


KINDS = {  # of checkpoints that are offloaded: how one is made, and a linear of the layer on disk with its dtype
    "floats": (lambda root, folder: root / "checkpoint", {"mlp.up_proj": torch.float32}),
    "a mixture": (
        lambda _, folder: packed(folder, "qwen3_moe") / "checkpoint",
        {"mlp.experts.3.up_proj": torch.float32},
    ),
    "integers": (
        lambda root, folder: quantized(shutil.copytree(root, folder / "root")),
        {"self_attn.q_proj": torch.int8, "mlp.down_proj": torch.uint8, "mlp.up_proj": torch.float8_e4m3fn},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_to_disk_and_to_the_hosts_memory_it_stays_packed_there(root, tmp_path, kind):
    make, linears = KINDS[kind]
    checkpoint = make(root, tmp_path)
    expected = logits(load(checkpoint))
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(checkpoint, device_map=device_map, offload_folder=tmp_path / "offloaded", offload_buffers=True)
    for _ in range(2):
        for name, dtype in linears.items():
            far = model.get_submodule(f"model.layers.1.{name}")
            assert not far.is_unpacked and far.core_values.is_meta and far.core_values.dtype == dtype
        assert close(logits(model), expected)
    offloaded = cpu_offload(load(checkpoint), execution_device="cpu", offload_buffers=True)
    assert all(tensor.is_meta for tensor in (*offloaded.parameters(), *offloaded.buffers()) if tensor.numel() > 64)
    assert close(logits(offloaded), expected)


def test_a_whole_model_compiles_without_a_break(root):
    model = load(root / "checkpoint")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(logits(compiled, use_cache=False), logits(model, use_cache=False))


WITHOUT_PLUGIN = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            kind.from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), error
        else:
            sys.exit(f"{folder}: loaded")
assert "armor" not in sys.modules
"""


def test_without_the_plugin_loading_stops(root, tmp_path):
    """Assembled or saved again, in a process that imports transformers alone."""
    load(root / "checkpoint").save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(root / "checkpoint"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def refused(folder, *parts, kind=AutoModelForCausalLM, **options):
    with pytest.raises(ArmorError) as error:
        load(folder, kind, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_one_error(checkpoint, defect):
    apply, parts = DEFECTS[defect]
    apply(checkpoint)
    refused(checkpoint)  # which of the two checks speaks first does not matter
    (checkpoint / "checksums.json").unlink()
    refused(checkpoint, *parts, ignore_mismatched_sizes=True)


V = "model.layers.1.self_attn.v_proj.core_values"


def changed(**keys):
    """A change to config.json."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return change


def without(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def with_one_more(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))


def one_higher(folder):
    edit_tensors(folder, lambda tensors: tensors.update({V: tensors[V] + 1}))


EMBEDDINGS = "model.embed_tokens.weight"
REFUSED = {  # a change, and what the one line names
    "no embeddings": (without(EMBEDDINGS), (EMBEDDINGS, "missing")),
    "a tensor more": (with_one_more("model.layers.0.mlp.extra.weight"), ("mlp.extra.weight", "no place")),
    "fewer layers": (changed(num_hidden_layers=1), ("model.layers.1.", "no such module")),
    "another size": (changed(intermediate_size=96), ("model.layers.0.mlp.", "96")),
}


@pytest.mark.parametrize("change", REFUSED)
def test_weights_that_do_not_fit_the_model_are_one_error(checkpoint, change):
    apply, parts = REFUSED[change]
    (checkpoint / "checksums.json").unlink()
    apply(checkpoint)
    refused(checkpoint, *parts)
    if change == "no embeddings":
        refused(checkpoint, EMBEDDINGS.removeprefix("model."), "missing", kind=AutoModel)
        refused(checkpoint, EMBEDDINGS, "missing", kind=AutoModelForSequenceClassification)


def test_hashes_find_what_nothing_else_shows_as_long_as_they_are_there(checkpoint):
    one_higher(checkpoint)
    refused(checkpoint, "model.safetensors", V, "checksums.json")
    changed(rms_norm_eps=0.1)(checkpoint)
    refused(checkpoint, "config.json", "delete checksums.json")
    (checkpoint / "checksums.json").unlink()
    load(checkpoint)


def test_a_dense_model_whose_config_says_armor(root, tmp_path):
    folder = shutil.copytree(root / "source", tmp_path / "dense")
    quantization = json.loads((root / "checkpoint/config.json").read_text())["quantization_config"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    refused(folder, "model.layers.0.self_attn.q_proj.core_values", "missing")
    refused(root / "source", "dense model", quantization_config=armor.runtime.quantizer.ArmorConfig(**quantization))
