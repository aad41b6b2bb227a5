"""Broken checkpoints: neither `from_pretrained` nor `armor verify` lets one pass, and both say in one line where.

A defect is a change to the folder of a tiny checkpoint, and what the message must name. Those of tests/packed.py are
tried too. All but those of HASHED show in the files themselves, so they are tried without checksums.json. Those of
HASHED are sound files with other numbers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.config.layers import LayerSettings
from armor.core.errors import ArmorError
from tests.packed import DEFECTS, edit_config, edit_tensors, opened, packed, quantized

Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"
ONE, INDEX, CONFIG, SUMS = "model.safetensors", "model.safetensors.index.json", "config.json", "checksums.json"
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
NAN, INF = float("nan"), float("inf")
Defect = tuple[Callable[[Path], object], tuple[str, ...]]


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Defect:
    """`edit` one tensor, in place or to what it returns; the message names the file and the tensor."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        changed = edit(tensors[name])
        tensors[name] = tensors[name] if changed is None else changed

    return lambda folder: edit_tensors(folder, apply), (ONE, name)


def put(name: str, number: float) -> Defect:
    return change(name, lambda tensor: tensor.view(-1).__setitem__(11 % tensor.numel(), number))


def drop(name: str) -> Defect:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name)), (ONE, name)


def add(name: str) -> Defect:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)})), (name,)


def config(edit: Callable[[dict], object], *named: str) -> Defect:
    """Edit the quantization_config; the message names config.json and `named`."""
    return lambda folder: edit_config(folder, edit), (CONFIG, *named)


def group(key: str, value: object, *named: str) -> Defect:
    """Edit the first group; the message names that, or `named`, where config.json alone could be right."""
    return config(lambda found: found["groups"][0].update({key: value}))[0], named or (CONFIG, "groups.0")


def edit_json(file: str, edit: Callable[[dict], object], *named: str) -> Defect:
    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        edit(value)
        (folder / file).write_text(json.dumps(value))

    return apply, (file, *named)


def index(edit: Callable[[dict], object], *named: str) -> Defect:
    return edit_json(INDEX, lambda value: edit(value["weight_map"]), *named)


def model(*named: str, **keys: object) -> Defect:
    """Other values in config.json, beside ours."""
    return edit_json(CONFIG, lambda value: value.update(keys))[0], named


def truncate(file: str, part: float) -> Defect:
    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * part)])

    return apply, (file,)


def swap_shards(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "kept")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "kept").rename(folder / SHARDS[1])


def double(folder: Path) -> None:
    """The first tensor of the first shard in the second as well."""
    name, tensor = min(load_file(folder / SHARDS[0]).items())
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}), SHARDS[1])


def move(folder: Path) -> None:
    """A tensor of the first shard goes to the second, and the index stays as it was."""
    double(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(min(tensors)), SHARDS[0])


UNLISTED = "not a tensor that config.json lists"
OF_FLOATS: dict[str, Defect] = DEFECTS | {
    "a missing dense tensor": drop("model.norm.weight"),
    "a tensor more": add("extra"),
    "a norm as int32": change("model.norm.weight", torch.Tensor.int),
    "a row less": change("lm_head.weight", lambda tensor: tensor[:-1]),
    "no groups at all": config(lambda found: found.pop("groups"), "groups"),
    "a block size that is no number": group("right_block_size", True),
    "no module": group("modules", []),
    "other features": group("out_features", 128, ONE, Q),
    "no right blocks": group("right_block_size", None, ONE, f"_proj.right: {UNLISTED}"),
    "a module in another group too": config(lambda f: f["groups"][1]["modules"].append(Q), "twice"),
    "more layers": model("model.layers.2.", num_hidden_layers=3),
    "a larger vocabulary": model(ONE, "lm_head.weight", "(300, 64)", vocab_size=300),
    "an empty file": truncate(ONE, 0),
    "a byte too many": (lambda folder: (folder / ONE).open("ab").write(b"\0"), (ONE,)),
}
OF_SHARDS: dict[str, Defect] = {
    "a shard is missing": (lambda folder: (folder / SHARDS[1]).unlink(), (SHARDS[1],)),
    "shards swapped": (swap_shards, ("model-0000",)),
    "a tensor in two shards": (double, (SHARDS[0], SHARDS[1], "lm_head.weight")),
    "a tensor in another shard": (move, (INDEX, "lm_head.weight")),
    "stale weights in one file": (lambda folder: shutil.copy(folder / SHARDS[0], folder / ONE), (ONE, "stale")),
    "an index that points elsewhere": index(lambda table: table.update({f"{Q}.left": f"../x/{ONE}"}), f"../x/{ONE}"),
    "an index with an empty table": index(dict.clear, "weight_map"),
    "an index cut off": truncate(INDEX, 0.7),
    "an index to the wrong shard": index(lambda table: table.update({f"{Q}.left": SHARDS[2]}), Q),
    "an index that lacks a tensor": index(lambda table: table.pop(f"{Q}.left"), f"{Q}.left"),
    "an index with a tensor too many": index(lambda table: table.update(extra=SHARDS[0]), "extra"),
}
OF_INTEGERS: dict[str, Defect] = {
    "version 1 with integers": config(lambda found: found.update(format_version=1), "quantization"),
    "no quantization": config(lambda found: found["groups"][0].pop("quantization"), "quantization"),
    "a type that is none": group("quantization", {"core": "fp4", "blocks": "int8", "group": 128}, CONFIG, "core"),
    "other groups": group("quantization", {"core": "int8", "blocks": "int8", "group": 8}, ONE, "core_scales"),
    "a type of as many bytes": group(
        "quantization", {"core": "fp8", "blocks": "int8", "group": 128}, ONE, "core_values", "int8", "float8_e4m3fn"
    ),
    "a dense pattern": group("pattern", "1:1", ONE, Q),
    "missing scales": drop(f"{Q}.core_scales"),
    "infinity in the scales of a block": put(f"{Q}.left_scales", INF),
    "-128": put(f"{Q}.core_values", -128),
    "NaN in fp8": put(f"{GATE}.core_values", NAN),
    "values in floats": change(f"{Q}.core_values", torch.Tensor.float),
}
OF_PAIRS: dict[str, Defect] = {
    "rank 0": group("rank", 0),
    "another rank": group("rank", 4, ONE, f"{Q}.up"),
    "no rank": (config(lambda found: found["groups"][0].pop("rank"))[0], (ONE, UNLISTED)),
    "one of the two": drop(f"{Q}.down"),
    "NaN in a pair": put(f"{Q}.up", NAN),
    "a pair in another dtype": change(f"{Q}.down", torch.Tensor.half),
}


HASHED: dict[str, Defect] = {
    "another number": put(f"{DOWN}.left", 0.125),
    "another mask of the pattern": change(f"{Q}.core_mask", lambda mask: mask.view(-1).__setitem__(0, ~mask[0, 0])),
    "another norm's constant": model(CONFIG, rms_norm_eps=0.1),
    "4:8 instead of 2:4": group("pattern", "4:8", CONFIG),
    "checksums cut off": truncate(SUMS, 0.5),
    "checksums of no version": edit_json(SUMS, lambda found: found.pop("format_version"), "format_version"),
    "checksums of a file elsewhere": edit_json(SUMS, lambda found: found["files"].update({"../x": {}}), "../x"),
    "checksums without a tensor": edit_json(SUMS, lambda found: found["tensors"].pop(f"{Q}.left"), f"{Q}.left"),
}
KINDS = {"floats": OF_FLOATS, "shards": OF_SHARDS, "integers": OF_INTEGERS, "pairs": OF_PAIRS}


@pytest.fixture(scope="module")
def sound(root, tmp_path_factory):
    """A sound checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("shards")
    assemble(*opened(root), root / "layers", folder / "checkpoint.json", max_shard_bytes=150_000)
    pairs = packed(tmp_path_factory.mktemp("pairs"), settings=LayerSettings(method="oats", rank=5))
    return {
        "floats": root / "checkpoint",
        "shards": folder / "checkpoint",
        "integers": quantized(root),
        "pairs": pairs / "checkpoint",
    }


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def message(read: Callable[[Path], object], folder: Path) -> str:
    """The one line that a reader refuses a folder with."""
    with pytest.raises(ArmorError) as error:
        read(folder)
    said = str(error.value)
    assert "\n" not in said and (str(folder) in said or CONFIG in said), said
    return said


def refused(folder: Path, named: tuple[str, ...]) -> None:
    """Both readers refuse, and name all of `named`."""
    for read in (load, verify):
        said = message(read, folder)
        assert all(part in said for part in named), (read.__name__, said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_one_is_read(sound, tmp_path, kind):
    folder = shutil.copytree(sound[kind], tmp_path / "sound")
    load(folder)
    assert verify(folder).checksums
    (folder / SUMS).unlink()
    load(folder)
    assert not verify(folder).checksums


@pytest.mark.parametrize(("kind", "defect"), [(kind, defect) for kind in KINDS for defect in KINDS[kind]])
def test_what_the_files_show(sound, tmp_path, kind, defect):
    apply, named = KINDS[kind][defect]
    folder = shutil.copytree(sound[kind], tmp_path / "broken")
    apply(folder)
    (folder / SUMS).unlink()
    refused(folder, named)


@pytest.mark.parametrize("defect", HASHED)
def test_what_only_the_hashes_show(checkpoint, defect):
    apply, named = HASHED[defect]
    apply(checkpoint)
    refused(checkpoint, named)


def flipped(content: bytes, draw: random.Random, suffix: str) -> bytes:
    """With another bit in a tensor of that suffix, or in the header."""
    stop = 8 + int.from_bytes(content[:8], "little")
    start, end = 0, stop
    if suffix != "header":
        header = json.loads(content[8:stop])
        start, end = draw.choice([item["data_offsets"] for name, item in header.items() if name.endswith(suffix)])
        start, end = stop + start, stop + end
    changed = bytearray(content)
    changed[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("sums", [False, True], ids=["alone", "with hashes"])
@pytest.mark.parametrize(
    ("kind", "file", "suffixes"),
    [
        ("floats", ONE, ("core_values", "core_mask", "left", "right", "norm.weight", "header")),
        ("shards", SHARDS[1], ("core_mask", "header")),
        ("integers", ONE, ("core_values", "core_scales", "core_mask", "left", "right_scales", "header")),
    ],
)
def test_any_bit_of_the_weights(sound, tmp_path, kind, file, suffixes, sums):
    """Twelve bits of each kind of place, and twelve cuts. Without hashes a bit of a number may be right."""
    folder = shutil.copytree(sound[kind], tmp_path / "broken")
    whole = (folder / file).read_bytes()
    if not sums:
        (folder / SUMS).unlink()
        suffixes = ("core_mask", "header")
    for seed in range(12):
        draw = random.Random(seed)
        broken = [flipped(whole, draw, suffix) for suffix in suffixes]
        for content in (*broken, whole[: draw.randrange(len(whole))]):
            (folder / file).unlink()  # a thread may still be hashing the one before, which is mapped
            (folder / file).write_bytes(content)
            message(verify, folder)
            message(load, folder)


@pytest.mark.parametrize(("kind", "file"), [("floats", CONFIG), ("floats", SUMS), ("shards", INDEX)])
def test_any_bit_of_what_is_beside_the_weights(sound, tmp_path, kind, file):
    """transformers reads config.json first, and may stumble before it asks for armor; it never gets to a model."""
    folder = shutil.copytree(sound[kind], tmp_path / "broken")
    whole = (folder / file).read_bytes()
    for seed in range(36):
        draw, content = random.Random(seed), bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(content)
        said = message(verify, folder)
        assert file in said or file == INDEX
        with pytest.raises(Exception) as error:
            load(folder)
        assert isinstance(error.value, ArmorError) or file == CONFIG
        assert CONFIG in str(error.value) or file != CONFIG or not isinstance(error.value, ArmorError)
