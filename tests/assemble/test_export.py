"""Export: the dense model that a packed checkpoint is, for programs without armor; whole or not at all."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.config.layers import LayerSettings
from armor.core.errors import ArmorError
from tests.packed import DEFECTS, edit_tensors, factors_of, packed

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("stored", "dtype"), [("float32", None), ("float32", "float16"), ("bfloat16", "float32")])
def test_products_are_float32_and_rounded_once(tmp_path, stored, dtype):
    root = packed(tmp_path, dtype=getattr(torch, stored))
    export(root / "checkpoint", tmp_path / "dense", dtype)
    found, source = (load_file(path / "model.safetensors") for path in (tmp_path / "dense", root / "source"))
    wanted = getattr(torch, dtype or stored)
    expected = source | {f"{name}.weight": factors.reconstruct() for name, factors in factors_of(root).items()}
    assert found.keys() == source.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted and torch.equal(tensor, expected[name].to(wanted)), name
    assert json.loads((tmp_path / "dense/config.json").read_text())["dtype"] == (dtype or stored)


def test_it_loads_where_there_is_no_armor(root, tmp_path):
    export(root / "checkpoint", tmp_path / "dense")
    code = (
        "import sys; sys.modules['armor'] = None\n"  # importing it now raises
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, info = AutoModelForCausalLM.from_pretrained('dense', output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "ids = AutoTokenizer.from_pretrained('dense')('the old city', return_tensors='pt').input_ids\n"
        "torch.save(model(ids).logits, 'logits.pt'); torch.save(ids, 'ids.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    ids, found = torch.load(tmp_path / "ids.pt"), torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(root / "checkpoint")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_in_the_folder(root, tmp_path):
    done = export(root / "checkpoint", tmp_path / "dense")
    dense = tmp_path / "dense"
    assert sorted(done.files) == sorted(file.name for file in dense.iterdir()) and done.multiplied_out == 14
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (dense / name).read_bytes() == (root / "source" / name).read_bytes()
    assert json.loads((dense / "config.json").read_text()) == json.loads((root / "source/config.json").read_text())
    assert "import armor" not in (dense / "README.md").read_text()
    assert verify(dense).compressed_count == 0 and verify(dense).checksums


def test_an_all_dense_checkpoint_is_copied(tmp_path):
    root = packed(tmp_path, settings=LayerSettings(method="dense"))
    export(root / "checkpoint", tmp_path / "dense")
    assert (tmp_path / "dense/model.safetensors").read_bytes() == (root / "source/model.safetensors").read_bytes()


def refused(checkpoint, output, *parts, **options):
    """One line, and nothing new beside the checkpoint."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(ArmorError) as error:
        export(checkpoint, output, **options)
    message = str(error.value)
    assert "\n" not in message and sorted(output.parent.rglob("*")) == before
    for part in parts:
        assert part in message, message


def test_a_broken_checkpoint(checkpoint, tmp_path):
    apply, parts = DEFECTS["mask not 2:4"]
    apply(checkpoint)
    refused(checkpoint, tmp_path / "dense")  # by its hashes, or sooner
    (checkpoint / "checksums.json").unlink()
    refused(checkpoint, tmp_path / "dense", *parts)


def test_an_output_that_is_there_or_a_model_that_is_dense(root, tmp_path):
    refused(root / "source", tmp_path / "dense", "config.json", "quant_method")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    for output in (tmp_path / "full", root / "checkpoint"):
        refused(root / "checkpoint", output, output.name, "is there already")
    (tmp_path / "empty").mkdir()
    export(root / "checkpoint", tmp_path / "empty")
    assert verify(tmp_path / "empty").shards == 1


def test_numbers_too_large_for_the_dtype(checkpoint, tmp_path):
    (checkpoint / "checksums.json").unlink()
    edit_tensors(checkpoint, lambda tensors: tensors[f"{Q}.left"].mul_(1e9))
    refused(checkpoint, tmp_path / "dense", f"{Q}.weight", "too large for float16", dtype="float16")
    export(checkpoint, tmp_path / "dense", "bfloat16")


def test_a_full_disk(root, small_disk):
    folder = small_disk("size=100k")
    refused(root / "checkpoint", folder / "dense", "0.0 GB free", "needed; make room")
    small_disk("remount,size=8m,nr_inodes=5")  # room for the tensors, but for so few files only
    refused(root / "checkpoint", folder / "dense", "cannot be written", "No space left")
    small_disk("remount,size=8m,nr_inodes=1000")
    export(root / "checkpoint", folder / "dense")
    assert verify(folder / "dense").checksums
