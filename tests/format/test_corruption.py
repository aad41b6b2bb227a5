"""Broken checkpoints: neither `from_pretrained` nor `armor verify` lets one pass, and both say in one line where.

A defect is a change to the folder of a tiny checkpoint, and what the message must name. Those of tests/packed.py are
tried too. All but those of HASHED show in the files themselves, so they are tried without checksums.json. Those of
HASHED are sound files with other numbers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
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
from armor.format.checksums import Hashing, read_checksums
from armor.format.shards import Shards
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


def copied(file: str, to: str) -> Defect:
    return lambda folder: shutil.copy(folder / file, folder / to), (to, "stale")


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


def outside(folder: Path) -> None:
    """The index sends readers to another folder, where a sound shard lies."""
    (folder.parent / "elsewhere").mkdir()
    shutil.move(folder / SHARDS[1], folder.parent / "elsewhere" / SHARDS[1])
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(SHARDS[1], f"../elsewhere/{SHARDS[1]}"))


UNLISTED = "not a tensor that config.json lists"
OF_FLOATS: dict[str, Defect] = DEFECTS | {
    **{
        f"missing {name}": drop(name)
        for name in (f"{DOWN}.right", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    },
    **{
        f"one more, {name}": add(name)
        for name in ("extra", "model.layers.7.mlp.up_proj.core_values", f"{Q}.core_scales", f"{Q}.bias")
    },
    **{f"{number} in a block": put(f"{Q}.left", number) for number in (NAN, INF)},
    **{f"mask {byte:08b}": put(f"{DOWN}.core_mask", byte) for byte in (0, 255, 0b00010011)},
    "mask as int8": change(f"{DOWN}.core_mask", lambda mask: mask.to(torch.int8)),
    "blocks as float64": change(f"{DOWN}.left", torch.Tensor.double),
    "a norm as int32": change("model.norm.weight", torch.Tensor.int),
    **{
        f"a row less of {name}": change(name, lambda tensor: tensor[:-1])
        for name in (f"{Q}.core_values", f"{Q}.core_mask", f"{Q}.right", "model.norm.weight", "lm_head.weight")
    },
    "a mask in a row": change(f"{DOWN}.core_mask", torch.Tensor.flatten),
    "tombstone of another shape": change(f"{Q}.weight", lambda tensor: torch.zeros(2).byte()),
    **{
        f"format_version {value!r}": config(lambda found, v=value: found.update(format_version=v), "format_version")
        for value in ("1", 1.0, None)
    },
    "no groups at all": config(lambda found: found.pop("groups"), "groups"),
    **{f"groups {value!r}": config(lambda f, v=value: f.update(groups=v), "groups") for value in ({}, [[]])},
    **{
        f"group's {key} {value!r}": group(key, value)
        for key, value in (
            ("pattern", "2:5"),
            ("pattern", 24),
            ("left_block_size", 0),
            ("right_block_size", True),
            ("out_features", None),
            ("in_features", 64.0),
            ("modules", []),
            ("modules", Q),
            ("modules", [1]),
        )
    },
    **{f"group's {key} 128": group(key, 128, ONE, Q) for key in ("out_features", "in_features")},
    "no right blocks": group("right_block_size", None, ONE, f"_proj.right: {UNLISTED}"),
    "a module in another group too": config(lambda f: f["groups"][1]["modules"].append(Q), "twice"),
    "fewer layers": model(CONFIG, "model.layers.1.", num_hidden_layers=1),
    "more layers": model("model.layers.2.", num_hidden_layers=3),
    "a wider model": model(CONFIG, "mlp", intermediate_size=160),
    "a larger vocabulary": model(ONE, "lm_head.weight", "(300, 64)", vocab_size=300),
    **{f"cut to {part}": truncate(ONE, part) for part in (0, 1e-5, 0.01)},
    "a byte too many": (lambda folder: (folder / ONE).open("ab").write(b"\0"), (ONE,)),
    "a stale shard": copied(ONE, SHARDS[0]),
}
OF_SHARDS: dict[str, Defect] = {
    "a shard is missing": (lambda folder: (folder / SHARDS[1]).unlink(), (SHARDS[1],)),
    "shards swapped": (swap_shards, ("model-0000",)),
    **{f"a shard cut to {part}": truncate(SHARDS[2], part) for part in (0, 0.02, 0.9999)},
    "a tensor in two shards": (double, (SHARDS[0], SHARDS[1], "lm_head.weight")),
    "a tensor in another shard": (move, (INDEX, "lm_head.weight")),
    "a stale shard": copied(SHARDS[0], "model-00004-of-00004.safetensors"),
    "stale weights in one file": copied(SHARDS[0], ONE),
    "an index that points elsewhere": (outside, (INDEX, "../elsewhere")),
    "an index without a table": edit_json(INDEX, lambda value: value.pop("weight_map"), "weight_map"),
    "an index with an empty table": index(dict.clear, "weight_map"),
    "an index that is a list": (lambda folder: (folder / INDEX).write_text("[]"), (INDEX,)),
    "an index cut off": truncate(INDEX, 0.7),
    "an index to a shard that is not there": (
        index(lambda table: table.update({f"{Q}.left": "model-00009-of-00003.safetensors"}))[0],
        ("model-00009-of-00003.safetensors", "missing"),
    ),
    "an index to the wrong shard": index(lambda table: table.update({f"{Q}.left": SHARDS[2]}), Q),
    "an index to a number": index(lambda table: table.update({f"{Q}.left": 1}), f"{Q}.left"),
    "an index that lacks a tensor": index(lambda table: table.pop(f"{Q}.left"), f"{Q}.left"),
    "an index with a tensor too many": index(lambda table: table.update(extra=SHARDS[0]), "extra"),
}
OF_INTEGERS: dict[str, Defect] = {
    "version 1 with integers": config(lambda found: found.update(format_version=1), "quantization"),
    "no quantization": config(lambda found: found["groups"][0].pop("quantization"), "quantization"),
    **{
        f"{key} {value!r}": config(lambda f, k=key, v=value: f["groups"][0]["quantization"].update({k: v}), key)
        for key, value in (
            ("core", "fp4"),
            ("core", None),
            ("core", ["int8"]),
            ("blocks", "int4"),
            ("blocks", True),
            ("group", 0),
            ("group", True),
            ("zero_points", 1),
        )
    },
    "other groups": group("quantization", {"core": "int8", "blocks": "int8", "group": 8}, ONE, "core_scales"),
    "another type": group("quantization", {"core": "int4", "blocks": "int8", "group": 128}, ONE, "core_values"),
    "a type of as many bytes": group(
        "quantization", {"core": "fp8", "blocks": "int8", "group": 128}, ONE, "core_values", "int8", "float8_e4m3fn"
    ),
    "a dense pattern": group("pattern", "1:1", ONE, Q),
    "missing scales": drop(f"{Q}.core_scales"),
    "missing scales of a block": drop(f"{Q}.right_scales"),
    "NaN in scales": put(f"{Q}.core_scales", NAN),
    "infinity in the scales of a block": put(f"{Q}.left_scales", INF),
    "-128": put(f"{Q}.core_values", -128),
    "NaN in fp8": put(f"{GATE}.core_values", NAN),
    "-128 in a block": put(f"{Q}.left", -128),
    "values in floats": change(f"{Q}.core_values", torch.Tensor.float),
    "scales in integers": change(f"{Q}.core_scales", torch.Tensor.int),
}
OF_PAIRS: dict[str, Defect] = {
    **{f"rank {value!r}": group("rank", value) for value in (None, 0, True, 2.0)},
    "another rank": group("rank", 4, ONE, f"{Q}.up"),
    "no rank": (config(lambda found: found["groups"][0].pop("rank"))[0], (ONE, UNLISTED)),
    "one of the two": drop(f"{Q}.down"),
    "NaN in a pair": put(f"{Q}.up", NAN),
    "a pair in another dtype": change(f"{Q}.down", torch.Tensor.half),
}


def sums(edit: Callable[[dict], object], *named: str) -> Defect:
    return edit_json(SUMS, edit, *named)


HASHED: dict[str, Defect] = {
    **{
        f"another number in {name}": put(name, 0.125) for name in (f"{Q}.core_values", f"{DOWN}.left", "lm_head.weight")
    },
    "infinity in a norm": put("model.norm.weight", INF),
    "another mask of the pattern": change(f"{Q}.core_mask", lambda mask: mask.view(-1).__setitem__(0, ~mask[0, 0])),
    "another norm's constant": model(CONFIG, rms_norm_eps=0.1),
    "no architectures": model(CONFIG, architectures=None),
    "4:8 instead of 2:4": group("pattern", "4:8", CONFIG),
    "a space after the config": (lambda folder: (folder / CONFIG).open("ab").write(b" "), (CONFIG,)),
    **{f"checksums cut to {part}": truncate(SUMS, part) for part in (0, 0.5)},
    "checksums of version true": sums(lambda found: found.update(format_version=True), "True"),
    "checksums of no version": sums(lambda found: found.pop("format_version"), "format_version"),
    "checksums with a key more": sums(lambda found: found.update(more=1), "more"),
    "checksums without files": sums(lambda found: found.update(files=[]), "files"),
    "checksums without the weights": sums(lambda found: found["files"].pop(ONE), ONE),
    "checksums of a file elsewhere": sums(lambda found: found["files"].update({"../x": {}}), "../x"),
    "checksums without a tensor": sums(lambda found: found["tensors"].pop(f"{Q}.left"), f"{Q}.left"),
    "checksums with a tensor more": sums(lambda found: found["tensors"].update(extra="0"), "extra"),
    "checksums with the hash of a file that is not loaded": sums(
        lambda found: found["files"]["generation_config.json"].update(sha256="0"), "sha256"
    ),
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


@pytest.mark.parametrize("by", ["hash", "another check"])
def test_no_file_is_read_once_one_was_refused(sound, tmp_path, by):
    """Whoever writes it anew then would otherwise lose the process, as a mapped file may not become shorter."""
    folder = shutil.copytree(sound["shards"], tmp_path / "broken")
    content = (folder / SHARDS[0]).read_bytes()
    (folder / SHARDS[0]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = Shards(folder)
    os.truncate(folder / SHARDS[1], 2**28)  # takes a while
    before = set(threading.enumerate())
    with pytest.raises(ArmorError, match="differs from its hash" if by == "hash" else by):
        with Hashing(found, read_checksums(found), found.files):
            if by != "hash":
                raise ArmorError(by)
    assert set(threading.enumerate()) == before


def test_no_weights_at_all(checkpoint):
    (checkpoint / ONE).unlink()
    assert ONE in message(verify, checkpoint)
    with pytest.raises(OSError, match=f"{ONE}.*{checkpoint}"):  # transformers' own
        load(checkpoint)
