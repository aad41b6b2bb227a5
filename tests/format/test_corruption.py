"""Over two hundred broken checkpoints: neither `from_pretrained` nor `armor verify` lets one pass, and both say where.

A defect is a change to the folder of a tiny checkpoint, in one file or in three shards, and what the message must name.
Those of `CONTENT` show in the files alone: they are tried without checksums.json too. Those of `HASHED` are sound files
with other numbers, which only the hashes tell.
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
from armor.format.checksums import Hashing, read_checksums, sealed
from armor.format.records.base import File
from armor.format.shards import Shards
from tests.packed import edit_config, edit_tensors, opened, packed, quantized

Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.gate_proj"
K = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
ONE, INDEX, CONFIG, SUMS = "model.safetensors", "model.safetensors.index.json", "config.json", "checksums.json"
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
FLIPS = 12  # bits, in every kind of place
Defect = tuple[Callable[[Path], object], tuple[str, ...]]


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Defect:
    """`edit` one tensor, in place or to what it returns; the message names the file and the tensor."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        changed = edit(tensors[name])
        tensors[name] = tensors[name] if changed is None else changed

    return lambda folder: edit_tensors(folder, apply), (ONE, name)


def put(name: str, number: float, place: int) -> Defect:
    return change(name, lambda tensor: tensor.view(-1).__setitem__(place % tensor.numel(), number))


def drop(name: str) -> Defect:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name)), (ONE, name)


def add(name: str, tensor: torch.Tensor) -> Defect:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensor})), (name,)


def config(edit: Callable[[dict], object], *named: str) -> Defect:
    return lambda folder: edit_config(folder, edit), (CONFIG, *named)


def group(key: str, value: object) -> Defect:
    return config(lambda found: found["groups"][0].update({key: value}), "groups.0")


def index(edit: Callable[[dict], object], *named: str) -> Defect:
    def apply(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        edit(value)
        (folder / INDEX).write_text(json.dumps(value))

    return apply, (INDEX, *named)


def truncate(file: str, part: float) -> Defect:
    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * part)])

    return apply, (file,)


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip(file: str, seed: str, where: str = "anywhere") -> Defect:
    """Flip one bit of a file: anywhere, in the header of a shard, or in a mask."""

    def apply(folder: Path) -> None:
        draw, content = random.Random(seed), bytearray((folder / file).read_bytes())
        start, stop = 0, len(content)
        if where != "anywhere":
            stop = header_bytes(content)
        if where in ("mask", "data"):
            header = json.loads(content[8:stop])
            masks = [item["data_offsets"] for name, item in header.items() if name.endswith("core_mask")]
            start, stop = (stop + place for place in draw.choice(masks)) if where == "mask" else (stop, len(content))
        content[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(content)

    return apply, ("core_mask" if where == "mask" else file,)


def swap_files(one: str, two: str) -> Defect:
    def apply(folder: Path) -> None:
        (folder / one).rename(folder / "kept")
        (folder / two).rename(folder / one)
        (folder / "kept").rename(folder / two)

    return apply, ("model-0000",)


def swap_tensors(one: str, two: str) -> Defect:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two], tensors[one]

    return lambda folder: edit_tensors(folder, apply), (ONE,)


def double(folder: Path) -> None:
    """The first tensor of the first shard in the second as well."""
    name, tensor = min(load_file(folder / SHARDS[0]).items())
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}), SHARDS[1])


def move(folder: Path) -> None:
    """A tensor of the first shard goes to the second, and the index stays as it was."""
    name, tensor = min(load_file(folder / SHARDS[0]).items())
    edit_tensors(folder, lambda tensors: tensors.pop(name), SHARDS[0])
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}), SHARDS[1])


def outside(folder: Path) -> None:
    """The index sends readers to another folder, where a sound shard lies."""
    (folder.parent / "elsewhere").mkdir()
    shutil.move(folder / SHARDS[1], folder.parent / "elsewhere" / SHARDS[1])
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(SHARDS[1], f"../elsewhere/{SHARDS[1]}"))


def edit_any(**keys: object) -> Callable[[Path], None]:
    """Other values in config.json, beside ours."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(value | keys))

    return apply


def only(modules: list[str]) -> Callable[[dict], None]:
    return lambda found: found["groups"][0].update(modules=modules)


SUFFIXES = ("core_values", "core_mask", "left", "right")
NAN, INF = float("nan"), float("inf")

# Seen in the files themselves, with or without checksums.json.
CONTENT: dict[str, Defect] = {
    **{f"missing {suffix}": drop(f"{Q}.{suffix}") for suffix in SUFFIXES},
    **{f"missing {suffix} further on": drop(f"{DOWN}.{suffix}") for suffix in SUFFIXES},
    **{
        f"missing {name}": drop(name)
        for name in (
            f"{Q}.weight",
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.1.input_layernorm.weight",
            "lm_head.weight",
        )
    },
    **{
        f"one more, {name}": add(name, torch.zeros(3))
        for name in (
            "extra",
            "model.layers.0.mlp.extra.weight",
            "model.layers.7.mlp.up_proj.core_values",
            "lm_head.core_mask",
            f"{DOWN}.weight",
            f"{Q}.core_scales",
            f"{Q}.bias",
        )
    },
    **{
        f"{number} in {name}": put(name, number, 7 * place)
        for place, number in enumerate((NAN, INF, -INF))
        for name in (f"{Q}.core_values", f"{Q}.left", f"{Q}.right", f"{DOWN}.core_values", f"{K}.left", f"{K}.right")
    },
    **{
        f"NaN in {name}": put(name, NAN, 11)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    },
    **{
        f"mask {byte:08b} in {name}": put(f"{name}.core_mask", byte, 3 * byte)
        for name in (Q, K, DOWN)
        for byte in (0, 255, 0b00110111, 0b00010011)
    },
    **{
        f"{suffix} as {dtype}": (
            change(f"{DOWN}.{suffix}", lambda tensor, to=dtype: tensor.to(getattr(torch, to)))[0],
            (ONE, f"{DOWN}.", "dtype"),  # of values and blocks that differ, either could be the wrong one
        )
        for suffix, dtypes in (
            ("core_mask", ("int32", "int8", "bool", "float32")),
            ("core_values", ("int32", "uint8", "float16")),
            ("left", ("int8", "float64")),
        )
        for dtype in dtypes
    },
    **{f"{name} as int32": change(name, torch.Tensor.int) for name in ("model.norm.weight", "lm_head.weight")},
    **{
        f"a row less of {name}": change(name, lambda tensor: tensor[:-1])
        for name in (
            *(f"{K}.{suffix}" for suffix in SUFFIXES),
            "model.norm.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
        )
    },
    **{f"{suffix} in a row": change(f"{DOWN}.{suffix}", lambda tensor: tensor.view(-1)) for suffix in SUFFIXES},
    "tombstone of another shape": change(f"{Q}.weight", lambda tensor: torch.zeros(2).byte()),
    **{
        f"format_version {value!r}": config(lambda found, v=value: found.update(format_version=v), "format_version")
        for value in (True, 3, 0, "1", 1.0, None, [1])
    },
    "no format_version": config(lambda found: found.pop("format_version"), "format_version"),
    "an unknown key": config(lambda found: found.update(scales=True), "scales"),
    "no groups": config(lambda found: found.pop("groups"), "groups"),
    **{f"groups {value!r}": config(lambda f, v=value: f.update(groups=v), "groups") for value in ([], {}, 3, [[]])},
    **{
        f"group's {key} {value!r}": group(key, value)
        for key, value in (
            ("pattern", "3:2"),
            ("pattern", "2:5"),
            ("pattern", 24),
            ("pattern", None),
            ("left_block_size", 24),
            ("left_block_size", 0),
            ("right_block_size", "16"),
            ("right_block_size", True),
            ("out_features", None),
            ("out_features", -64),
            ("in_features", 64.0),
            ("modules", []),
            ("modules", Q),
            ("modules", [Q, Q]),
            ("modules", [1]),
            ("scale", 1),
        )
    },
    **{
        f"group's {key} {value!r}, which could be": (group(key, value)[0], (ONE, Q))
        for key, value in (
            ("pattern", "1:4"),
            ("left_block_size", 32),
            ("right_block_size", 32),
            ("out_features", 128),
            ("in_features", 128),
        )
    },
    **{
        f"no {side}": (
            group(f"{side}_block_size", None)[0],
            (ONE, f"_proj.{side}: not a tensor that config.json lists"),
        )
        for side in ("left", "right")
    },
    "a module that is not there": (config(only(["model.layers.9.mlp.up_proj"]))[0], ("model.layers.9.mlp.up_proj",)),
    "a module in another group too": config(
        lambda found: found["groups"][1]["modules"].append(found["groups"][0]["modules"][0]), "twice"
    ),
    "a module left out": (
        lambda folder: edit_config(folder, lambda found: found["groups"][0]["modules"].pop()),
        ("not a tensor that config.json lists",),
    ),
    "a group left out": (
        lambda folder: edit_config(folder, lambda found: found["groups"].pop()),
        ("not a tensor that config.json lists",),
    ),
    "fewer layers": (edit_any(num_hidden_layers=1), (CONFIG, "model.layers.1.")),
    "more layers": (edit_any(num_hidden_layers=3), ("model.layers.2.",)),
    "a wider model": (edit_any(intermediate_size=160), (CONFIG, "mlp")),
    "a larger vocabulary": (edit_any(vocab_size=300), (ONE, "lm_head.weight", "(300, 64)")),
    **{f"header, bit {seed}": flip(ONE, f"header {seed}", "header") for seed in range(2 * FLIPS)},
    **{f"mask, bit {seed}": flip(ONE, f"mask {seed}", "mask") for seed in range(2 * FLIPS)},
    **{f"cut to {part}": truncate(ONE, part) for part in (0, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999)},
    "a byte too many": (lambda folder: (folder / ONE).open("ab").write(b"\0"), (ONE,)),
    "a stale shard": (lambda folder: shutil.copy(folder / ONE, folder / SHARDS[0]), (SHARDS[0], "stale")),
}

# The same, of a checkpoint in three shards.
SHARDED: dict[str, Defect] = {
    **{f"{file[:11]} is missing": (lambda folder, f=file: (folder / f).unlink(), (file,)) for file in SHARDS},
    **{
        f"{SHARDS[a][:11]} and {SHARDS[b][:11]} swapped": swap_files(SHARDS[a], SHARDS[b])
        for a, b in ((0, 1), (1, 2), (0, 2))
    },
    **{
        f"{file[:11]} cut to {part}": truncate(file, part)
        for file in SHARDS
        for part in (0, 1e-4, 0.02, 0.4, 0.8, 0.9999)
    },
    **{
        f"{file[:11]}, header bit {seed}": flip(file, f"{file} {seed}", "header")
        for file in SHARDS
        for seed in range(6)
    },
    **{
        f"{file[:11]}, mask bit {seed}": flip(file, f"{file} {seed}", "mask")
        for file in SHARDS[1:2]
        for seed in range(6)
    },
    "a tensor in two shards": (double, (SHARDS[0], SHARDS[1], "lm_head.weight")),
    "a tensor in another shard": (move, (INDEX, "lm_head.weight")),
    "a stale shard": (
        lambda folder: shutil.copy(folder / SHARDS[0], folder / "model-00004-of-00004.safetensors"),
        ("model-00004-of-00004.safetensors", "stale"),
    ),
    "stale weights in one file": (lambda folder: shutil.copy(folder / SHARDS[0], folder / ONE), (ONE, "stale")),
    "an index that points elsewhere": (outside, (INDEX, "../elsewhere")),
    "an index without a table": index(lambda value: value.pop("weight_map"), "weight_map"),
    "an index with an empty table": index(lambda value: value["weight_map"].clear(), "weight_map"),
    "an index that is a list": (lambda folder: (folder / INDEX).write_text("[]"), (INDEX,)),
    "an index that is empty": truncate(INDEX, 0),
    "an index cut off": truncate(INDEX, 0.7),
    "an index to a shard that is not there": (
        index(lambda value: value["weight_map"].update({f"{Q}.left": "model-00009-of-00003.safetensors"}))[0],
        ("model-00009-of-00003.safetensors", "missing"),
    ),
    "an index to the wrong shard": index(lambda value: value["weight_map"].update({f"{Q}.left": SHARDS[2]}), Q),
    "an index to a number": index(lambda value: value["weight_map"].update({f"{Q}.left": 1}), f"{Q}.left"),
    "an index that lacks a tensor": index(lambda value: value["weight_map"].pop(f"{Q}.left"), f"{Q}.left"),
    "an index with a tensor too many": index(lambda value: value["weight_map"].update(extra=SHARDS[0]), "extra"),
}

# What only the hashes show: sound files that hold something else.
HASHED: dict[str, Defect] = {
    **{f"data, bit {seed}": flip(ONE, f"data {seed}", "data") for seed in range(2 * FLIPS)},
    **{
        f"another number in {name}": put(name, 0.125, 5)
        for name in (f"{Q}.core_values", f"{DOWN}.left", "lm_head.weight")
    },
    "infinity in a norm": put("model.norm.weight", INF, 3),
    **{
        f"{suffix} swapped": swap_tensors(
            f"model.layers.0.mlp.up_proj.{suffix}", f"model.layers.1.mlp.up_proj.{suffix}"
        )
        for suffix in SUFFIXES
    },
    "norms swapped": swap_tensors("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    "another mask of the pattern": change(f"{Q}.core_mask", lambda mask: mask.view(-1).__setitem__(0, ~mask[0, 0])),
    "another norm's constant": (edit_any(rms_norm_eps=0.1), (CONFIG,)),
    "another rotary base": (edit_any(rope_theta=7.0), (CONFIG,)),
    "no architectures": (edit_any(architectures=None), (CONFIG,)),
    "4:8 instead of 2:4": (group("pattern", "4:8")[0], (CONFIG,)),
    **{f"the last byte of {name}": (lambda f, n=name: (f / n).open("ab").write(b" "), (name,)) for name in (CONFIG,)},
}


def edit_sums(edit: Callable[[dict], object], *named: str) -> Defect:
    def apply(folder: Path) -> None:
        value = json.loads((folder / SUMS).read_text())
        edit(value)
        (folder / SUMS).write_text(json.dumps(value))

    return apply, (SUMS, *named)


HASHED |= {
    "checksums cut off": truncate(SUMS, 0.5),
    "checksums empty": truncate(SUMS, 0),
    "checksums of version true": edit_sums(lambda sums: sums.update(format_version=True), "True"),
    "checksums of no version": edit_sums(lambda sums: sums.pop("format_version"), "format_version"),
    "checksums with a key more": edit_sums(lambda sums: sums.update(more=1), "more"),
    "checksums without files": edit_sums(lambda sums: sums.update(files=[]), "files"),
    "checksums without the weights": edit_sums(lambda sums: sums["files"].pop(ONE), ONE),
    "checksums without config.json": edit_sums(lambda sums: sums["files"].pop(CONFIG), CONFIG),
    "checksums of a file elsewhere": edit_sums(lambda sums: sums["files"].update({"../x": {}}), "../x"),
    "checksums without a tensor": edit_sums(lambda sums: sums["tensors"].pop(f"{Q}.left"), f"{Q}.left"),
    "checksums with a tensor more": edit_sums(lambda sums: sums["tensors"].update(extra="0"), "extra"),
    "checksums with another size": (
        edit_sums(
            lambda sums: (
                sums["files"][ONE].update(bytes=1)
                or sums.update(sealed({name: File(**f) for name, f in sums["files"].items()}, sums["tensors"]))
            )
        )[0],
        (ONE, "hash in checksums.json"),
    ),
    "checksums with the hash of a file that is not loaded": edit_sums(
        lambda sums: sums["files"]["generation_config.json"].update(sha256="0"), "sha256"
    ),
}


@pytest.fixture(scope="module")
def shards(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    assemble(*opened(root), root / "layers", folder / "checkpoint.json", max_shard_bytes=150_000)
    return folder / "checkpoint"


def copied(sound: Path, folder: Path, apply: Callable[[Path], object], sums: bool) -> Path:
    """A copy of a checkpoint, broken, with or without its checksums."""
    shutil.copytree(sound, folder)
    apply(folder)
    if not sums:
        (folder / SUMS).unlink()
    return folder


def message(read: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(ArmorError) as error:
        read(folder)
    said = str(error.value)
    assert "\n" not in said and (str(folder) in said or CONFIG in said), said
    return said


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def refused(folder: Path, named: tuple[str, ...], exactly: bool) -> None:
    """Both readers refuse; where `exactly`, they name all of `named` (else whichever check speaks first is right)."""
    for read in (load, verify):
        said = message(read, folder)
        for part in named if exactly else ():
            assert part in said, (read.__name__, said)


def test_there_are_enough_of_them(root, shards):
    assert len(CONTENT) + len(SHARDED) + len(HASHED) > 250
    for sound in (root / "checkpoint", shards):
        load(sound)
        verify(sound)


@pytest.mark.parametrize("sums", [False, True], ids=["alone", "with hashes"])
@pytest.mark.parametrize("defect", CONTENT)
def test_what_the_files_show(root, tmp_path, defect, sums):
    apply, named = CONTENT[defect]
    refused(copied(root / "checkpoint", tmp_path / "broken", apply, sums), named, exactly=not sums)


@pytest.mark.parametrize("sums", [False, True], ids=["alone", "with hashes"])
@pytest.mark.parametrize("defect", SHARDED)
def test_what_the_shards_show(shards, tmp_path, defect, sums):
    apply, named = SHARDED[defect]
    refused(copied(shards, tmp_path / "broken", apply, sums), named, exactly=not sums)


@pytest.mark.parametrize("defect", HASHED)
def test_what_only_the_hashes_show(root, tmp_path, defect):
    apply, named = HASHED[defect]
    refused(copied(root / "checkpoint", tmp_path / "broken", apply, sums=True), named, exactly=True)


@pytest.mark.parametrize("by", ["hash", "another check"])
def test_no_file_is_read_once_one_was_refused(shards, tmp_path, by):
    """Whoever writes it anew then would otherwise lose the process, as a mapped file may not become shorter."""
    folder = copied(shards, tmp_path / "broken", flip(SHARDS[0], "any", "data")[0], sums=True)
    opened = Shards(folder)
    os.truncate(folder / SHARDS[1], 2**28)  # takes a while
    before = set(threading.enumerate())
    with pytest.raises(ArmorError, match="differs from its hash" if by == "hash" else by):
        with Hashing(opened, read_checksums(opened), opened.files):
            if by != "hash":
                raise ArmorError(by)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("seed", range(3 * FLIPS))
def test_a_bit_of_the_config(root, tmp_path, seed):
    """transformers reads config.json first, and may stumble before it asks for armor; it never gets to a model."""
    apply, named = flip(CONFIG, f"config {seed}")
    folder = copied(root / "checkpoint", tmp_path / "broken", apply, sums=True)
    assert CONFIG in message(verify, folder)
    with pytest.raises(Exception) as error:
        load(folder)
    if isinstance(error.value, ArmorError):
        assert CONFIG in str(error.value)


@pytest.mark.parametrize("seed", range(3 * FLIPS))
def test_a_bit_of_the_checksums(root, tmp_path, seed):
    apply, named = flip(SUMS, f"sums {seed}")
    refused(copied(root / "checkpoint", tmp_path / "broken", apply, sums=True), named, exactly=True)


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_bit_of_the_index(shards, tmp_path, seed):
    apply, named = flip(INDEX, f"index {seed}")
    refused(copied(shards, tmp_path / "broken", apply, sums=True), named, exactly=False)


@pytest.fixture(scope="module")
def integers(root):
    return quantized(root)


def place_in(content: bytes, suffix: str, draw: random.Random) -> int:
    """A byte of a tensor of that suffix, or of the header."""
    stop = header_bytes(content)
    if suffix == "header":
        return draw.randrange(stop)
    header = json.loads(content[8:stop])
    start, end = draw.choice([item["data_offsets"] for name, item in header.items() if name.endswith(suffix)])
    return stop + draw.randrange(start, end)


def test_two_hundred_broken_checkpoints_of_integers(integers, tmp_path):
    """A bit of the values, scales, mask, blocks or header, or an end that is missing: none of them is read."""
    whole, folder = (integers / ONE).read_bytes(), tmp_path / "broken"
    shutil.copytree(integers, folder)
    verify(folder)
    kinds = ("core_values", "core_scales", "core_mask", "left", "right_scales", "header", "cut")
    for seed in range(203):
        draw, content, kind = random.Random(seed), bytearray(whole), kinds[seed % len(kinds)]
        if kind == "cut":
            del content[draw.randrange(len(content)) :]
        else:
            content[place_in(whole, kind, draw)] ^= 1 << draw.randrange(8)
        (folder / ONE).unlink()  # a thread may still be hashing the one before, which is mapped
        (folder / ONE).write_bytes(content)
        message(verify, folder)
        message(load, folder)


OF_INTEGERS: dict[str, Defect] = {
    "version 1 with integers": config(lambda found: found.update(format_version=1), "quantization"),
    "no quantization": config(lambda found: found["groups"][0].pop("quantization"), "quantization"),
    **{
        f"{key} {value!r}": config(lambda f, k=key, v=value: f["groups"][0]["quantization"].update({k: v}), key)
        for key, value in (
            ("core", "int2"),
            ("core", "fp4"),
            ("core", None),
            ("core", ["int8"]),
            ("blocks", "int4"),
            ("blocks", True),
            ("group", 0),
            ("group", True),
            ("group", None),
            ("zero_points", 1),
        )
    },
    "other groups": (group("quantization", {"core": "int8", "blocks": "int8", "group": 8})[0], (ONE, "core_scales")),
    "another type": (group("quantization", {"core": "int4", "blocks": "int8", "group": 128})[0], (ONE, "core_values")),
    "a type of as many bytes": (
        group("quantization", {"core": "fp8", "blocks": "int8", "group": 128})[0],
        (ONE, "core_values", "int8", "float8_e4m3fn"),
    ),
    "a dense pattern": (group("pattern", "1:1")[0], (ONE, Q)),
    "missing scales": drop(f"{Q}.core_scales"),
    "missing scales of a block": drop(f"{Q}.right_scales"),
    "NaN in scales": put(f"{Q}.core_scales", NAN, 5),
    "infinity in the scales of a block": put(f"{Q}.left_scales", INF, 5),
    "-128": put(f"{Q}.core_values", -128, 7),
    "NaN in fp8": put(f"{GATE}.core_values", NAN, 7),
    "-128 in a block": put(f"{Q}.left", -128, 7),
    "values in floats": change(f"{Q}.core_values", torch.Tensor.float),
    "scales in integers": change(f"{Q}.core_scales", torch.Tensor.int),
}


@pytest.mark.parametrize("defect", OF_INTEGERS)
def test_what_the_files_of_integers_show(integers, tmp_path, defect):
    apply, named = OF_INTEGERS[defect]
    refused(copied(integers, tmp_path / "broken", apply, sums=False), named, exactly=True)


OF_PAIRS: dict[str, Defect] = {
    **{f"rank {value!r}": group("rank", value) for value in (None, 0, True, 2.0, "5")},
    "another rank": (group("rank", 4)[0], (ONE, f"{Q}.up")),
    "no rank": (config(lambda found: found["groups"][0].pop("rank"))[0], (ONE, "not a tensor that config.json lists")),
    "one of the two": drop(f"{Q}.down"),
    "NaN in a pair": put(f"{Q}.up", NAN, 5),
    "a pair in another dtype": change(f"{Q}.down", torch.Tensor.half),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("pairs"), settings=LayerSettings(method="oats", rank=5)) / "checkpoint"


@pytest.mark.parametrize("defect", OF_PAIRS)
def test_what_the_files_of_pairs_show(pairs, tmp_path, defect):
    apply, named = OF_PAIRS[defect]
    refused(copied(pairs, tmp_path / "broken", apply, sums=False), named, exactly=True)


def test_no_weights_at_all(root, tmp_path):
    folder = copied(root / "checkpoint", tmp_path / "broken", lambda folder: (folder / ONE).unlink(), sums=True)
    assert ONE in message(verify, folder)
    with pytest.raises(OSError, match=f"{ONE}.*{folder}"):  # transformers' own
        load(folder)
