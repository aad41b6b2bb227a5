"""The packed checkpoint: which tensors stand for a compressed linear, and how a sound one is told from a broken one.

A checkpoint is a Hugging Face folder in which `{linear}.weight` has become `{linear}.core_values`, `.core_mask`,
`.left` and `.right`, scales of those that are quantized, and `.up` and `.down`, a pair of low rank. Which linears, with
which shapes and types, stands in config.json under `quantization_config`. Linears that share B have it once. A
checkpoint without scales, pairs and a shared B is of version 1, as it always was.
docs/FORMAT.md says the same in words. Readers in the field believe what they read and compute garbage from a broken
file. So the writer, the loader and `armor verify` all go through the checks of this module and of `checksums`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armor.core.errors import ArmorError
from armor.core.factorization import SUFFIXES, Factorization, kept_in, owner
from armor.core.packing import unpack_mask
from armor.core.pattern import Pattern, is_nm
from armor.core.quantization import LIMITS, STORED, Quantization, groups_of
from armor.execution.files import read_json
from armor.format.shards import INDEX, SINGLE, Shards

__all__ = [
    "CHECKPOINT_VERSION",
    "EXTENDED_VERSION",
    "QUANT_METHOD",
    "REMEDY",
    "PackedLinear",
    "check_headers",
    "check_keys",
    "check_tensor",
    "modules_of",
    "quantization_config",
    "read_packed",
    "tombstone",
]

QUANT_METHOD = "armor"
CHECKPOINT_VERSION = 1
EXTENDED_VERSION = 2
"""The version of a checkpoint with linears that are quantized, share B, or have a pair of low rank."""
OPTIONAL = ("right_of", "rank")
"""Keys of a group in version 2 that are there only where they say something."""
FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
REMEDY = "assemble or copy the checkpoint again"
WEIGHTS = (SINGLE, "model-*-of-*.safetensors")
ENTRIES = 1 << 24  # of a mask that are unpacked at a time


@dataclass(frozen=True)
class PackedLinear:
    """A compressed linear: the (out, in) of the weight it replaces, the core's pattern, the wrappers' block sizes.

    `left_block_size` d makes `left` (out/d, d, d), `right_block_size` d makes `right` (in/d, d, d); None: no wrapper.
    `quantization` says which of the tensors have scales; None: none of them. `right_of` is the last part of the name
    of the linear beside it that holds its B; None: it holds its own. `rank` r makes `up` (out, r) and `down` (r, in);
    None: no pair of low rank.
    """

    out_features: int
    in_features: int
    pattern: Pattern
    left_block_size: int | None = None
    right_block_size: int | None = None
    quantization: Quantization | None = None
    right_of: str | None = None
    rank: int | None = None

    @classmethod
    def of(cls, factors: Factorization) -> PackedLinear:
        """The layout of a factorization."""
        left, right = (None if side is None else side.shape[1] for side in (factors.left, factors.right))
        rank = None if factors.down is None else len(factors.down)
        out, columns = factors.core.shape
        return cls(out, columns, factors.pattern, left, right, factors.quantization, factors.right_of, rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the linear holds, by its suffix."""
        kept, own = kept_in(self.in_features, self.pattern), self.quantization
        shapes: dict[str, tuple[int, ...]] = {"core_values": (self.out_features, kept)}
        if own is not None:
            if own.core == "int4":
                shapes["core_values"] = (self.out_features, -(-kept // 2))
            shapes["core_scales"] = (self.out_features, groups_of(self.in_features, own.group))
        if not self.pattern.is_dense:
            shapes["core_mask"] = (self.out_features, -(-self.in_features // 8))
        sides = (("left", self.left_block_size, self.out_features), ("right", self.right_block_size, self.in_features))
        for side, d, dimension in sides:
            if d and not (side == "right" and self.right_of):
                shapes[side] = (dimension // d, d, d)
                if own is not None and own.blocks:
                    shapes[f"{side}_scales"] = (dimension,)
        if self.rank:
            shapes |= {"up": (self.out_features, self.rank), "down": (self.rank, self.in_features)}
        return shapes

    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor that is not of the linear's own, by suffix."""
        found, own = {"core_mask": "uint8"}, self.quantization
        if own is not None:
            found["core_values"] = STORED[own.core]
            if own.blocks:
                found |= {"left": "int8", "right": "int8"}
        return found

    def bits_per_weight(self, bits: int) -> float:
        """What one entry of the weight takes as this pipeline stores it, the floats of what is not quantized in a dtype
        of `bits` bits; the mask takes one bit for each column. A linear with integers has its floats in bfloat16."""
        widths, floats = self.dtypes(), bits if self.quantization is None else 16
        total = sum(math.prod(shape) * (8 if suffix in widths else floats) for suffix, shape in self.shapes().items())
        return total / (self.out_features * self.in_features)


def quantization_config(modules: Mapping[str, PackedLinear]) -> dict:
    """What config.json says of `modules`: those of the same layout listed in one group, in the order of `modules`."""
    groups: dict[PackedLinear, list[str]] = {}
    for name, layout in modules.items():
        groups.setdefault(layout, []).append(name)
    described = [asdict(key) | {"pattern": str(key.pattern), "modules": names} for key, names in groups.items()]
    extended = any(layout.quantization or layout.right_of or layout.rank for layout in groups)
    version = EXTENDED_VERSION if extended else CHECKPOINT_VERSION
    for group in described:
        if version == CHECKPOINT_VERSION:
            del group["quantization"]
        for key in OPTIONAL:
            if group[key] is None:
                del group[key]
    return {"quant_method": QUANT_METHOD, "format_version": version, "groups": described}


def modules_of(config: object, where: str = "config.json: quantization_config") -> dict[str, PackedLinear]:
    """The compressed linears by name, in order, from what config.json says. Raises ArmorError for anything unknown."""
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        found = config.get("quant_method") if isinstance(config, Mapping) else config
        raise ArmorError(
            f"{where}: found {found!r}, expected quant_method {QUANT_METHOD!r}; is this a packed checkpoint?"
        )
    version = config.get("format_version")
    if type(version) is not int or version not in (CHECKPOINT_VERSION, EXTENDED_VERSION):  # True == 1
        raise ArmorError(
            f"{where}: format_version {version!r}, expected {CHECKPOINT_VERSION} or {EXTENDED_VERSION}; use the armor "
            "that wrote it"
        )
    check_keys(config, ("quant_method", "format_version", "groups"), where)
    if not isinstance(config["groups"], (list, tuple)) or not config["groups"]:
        raise ArmorError(f"{where}: groups {config['groups']!r}, expected a list of groups of modules; {REMEDY}")
    modules: dict[str, PackedLinear] = {}
    for index, group in enumerate(config["groups"]):
        place = f"{where}: groups.{index}"
        layout = _layout(group, place, version)
        names = group["modules"]
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise ArmorError(f"{place}.modules: found {names!r}, expected a list of names; {REMEDY}")
        for name in names:
            if name in modules:
                raise ArmorError(f"{place}.modules: {name} is listed twice; {REMEDY}")
            modules[name] = layout
    for name, layout in modules.items():
        if layout.right_of is not None:
            _check_holder(name, layout, modules, where)
    return modules


def _check_holder(name: str, layout: PackedLinear, modules: Mapping[str, PackedLinear], where: str) -> None:
    """Raises ArmorError unless the linear that `right_of` names holds a B that fits linear `name`."""
    holder = owner(name, "right", layout.right_of)

    def of_right(own: PackedLinear) -> tuple:
        return own.in_features, own.right_block_size, own.quantization and own.quantization.blocks

    found = modules.get(holder)
    if found is None or found.right_of or of_right(found) != of_right(layout):
        raise ArmorError(f"{where}: {name}: right_of {layout.right_of!r}: {holder} has no such B; {REMEDY}")


def check_keys(found: object, expected: Iterable[str], where: str) -> None:
    """Raises ArmorError unless `found` is a mapping with exactly the keys `expected`; `where` begins the message."""
    expected = set(expected)
    keys = set(found) if isinstance(found, Mapping) else set()
    if wrong := sorted(map(str, keys ^ expected)):
        what = "unknown" if wrong[0] in keys else "missing"
        raise ArmorError(f"{where}: {what} key {wrong[0]}, expected {', '.join(sorted(expected))}; {REMEDY}")


def _layout(group: object, where: str, version: int) -> PackedLinear:
    extended = version == EXTENDED_VERSION
    keys = [key for key in PackedLinear.__dataclass_fields__ if extended or key != "quantization"]
    given = group if isinstance(group, Mapping) and extended else {}
    keys = [key for key in keys if key not in OPTIONAL or key in given]
    check_keys(group, [*keys, "modules"], where)
    values = {key: group[key] for key in keys}  # pyright: ignore[reportIndexIssue]  it is a mapping: just checked
    for key in ("out_features", "in_features", "left_block_size", "right_block_size", *({"rank"} & values.keys())):
        value = values[key]
        if not (type(value) is int and value > 0 or value is None and key.endswith("block_size")):
            raise ArmorError(f"{where}.{key}: found {value!r}, expected a positive integer; {REMEDY}")
    for key, block in (("out_features", "left_block_size"), ("in_features", "right_block_size")):
        if values[block] and values[key] % values[block]:
            raise ArmorError(f"{where}.{block}: {values[block]} does not divide {key} {values[key]}; {REMEDY}")
    try:
        if not isinstance(values["pattern"], str):
            raise ValueError(f"pattern {values['pattern']!r}: expected text, like 2:4")
        values["pattern"] = Pattern.parse(values["pattern"])
        values["pattern"].group(values["in_features"])
        if values["pattern"].is_dense and values.get("quantization") is None:
            raise ValueError("pattern 1:1: only with integers, as a dense weight in floats is stored as it is")
    except ValueError as error:
        raise ArmorError(f"{where}.pattern: {error}; {REMEDY}") from None
    of = values.get("right_of", "q_proj")
    if not (isinstance(of, str) and of) or "right_of" in values and not values["right_block_size"]:
        raise ArmorError(f"{where}.right_of: found {of!r}, expected the name of a linear beside it, and a B; {REMEDY}")
    if values.get("quantization") is not None:
        values["quantization"] = _quantization(values["quantization"], f"{where}.quantization")
    return PackedLinear(**values)


def _quantization(found: object, where: str) -> Quantization:
    check_keys(found, Quantization.__dataclass_fields__, where)
    values: dict[str, Any] = {**found}  # pyright: ignore[reportGeneralTypeIssues]  just checked
    allowed = {"core": tuple(LIMITS), "blocks": (None, "int8")}
    for key, known in allowed.items():
        if values[key] not in known or not isinstance(values[key], str | None):
            said = ", ".join("null" if each is None else each for each in known)
            raise ArmorError(f"{where}.{key}: found {values[key]!r}, expected one of {said}; {REMEDY}")
    if type(values["group"]) is not int or values["group"] < 1:
        raise ArmorError(f"{where}.group: found {values['group']!r}, expected a positive integer; {REMEDY}")
    return Quantization(**values)


def tombstone(modules: Mapping[str, PackedLinear]) -> str:
    """The name of the tensor, shape (1,) uint8, that stops readers which know nothing of this format.

    Named like a dense weight, its shape is an error to them; without it transformers would fill the linears with random
    numbers and go on.
    """
    return f"{next(iter(modules))}.weight"


def check_headers(  # noqa: C901, PLR0912  one defect after another, each with its own line
    shards: Shards, modules: Mapping[str, PackedLinear]
) -> None:
    """Hold names, shapes and dtypes of a checkpoint's tensors against `modules` and the index. Raises ArmorError."""
    for name, layout in modules.items():
        dtype, others = None, layout.dtypes()
        for suffix, shape in layout.shapes().items():
            tensor = f"{name}.{suffix}"
            if tensor not in shards:
                dense = f"{name}.weight" in shards and f"{name}.weight" != tombstone(modules)
                missing = f"missing, config.json lists it with shape {shape}"
                state = "a dense weight stands in its place" if dense else missing
                raise ArmorError(f"{shards.place}: {tensor}: {state}; {REMEDY}")
            where = shards.where(tensor)
            if shards.shape(tensor) != shape:
                raise ArmorError(f"{where}: shape {shards.shape(tensor)}, expected {shape}; {REMEDY}")
            found = shards.dtype(tensor)
            if suffix in others:
                if found != others[suffix]:
                    raise ArmorError(f"{where}: dtype {found}, expected {others[suffix]}; {REMEDY}")
            elif found not in FLOATS or found != (dtype or found):
                raise ArmorError(f"{where}: dtype {found}, expected {dtype or 'a float dtype'}; {REMEDY}")
            else:
                dtype = found
    for tensor in shards.names():
        name, _, suffix = tensor.rpartition(".")
        where = shards.where(tensor)
        if suffix in SUFFIXES and (name not in modules or suffix not in modules[name].shapes()):
            raise ArmorError(f"{where}: not a tensor that config.json lists; {REMEDY}")
        if suffix == "weight" and name in modules and tensor != tombstone(modules):
            raise ArmorError(f"{where}: a dense weight of a linear that config.json lists as compressed; {REMEDY}")
    on_disk = {file.name for pattern in WEIGHTS for file in shards.folder.glob(pattern)}
    if stale := sorted(on_disk - set(shards.files)):
        raise ArmorError(
            f"{shards.folder / stale[0]}: stale weights, expected {', '.join(shards.files[:3])} alone; delete it"
        )
    index = shards.folder / INDEX
    if index.is_file() and (unlisted := sorted(set(shards.names()) - read_json(index)["weight_map"].keys())):
        raise ArmorError(f"{index}: {unlisted[0]}: in {shards.file_of(unlisted[0])}, but not in the index; {REMEDY}")
    if not modules:
        return
    guard = tombstone(modules)
    if guard not in shards or shards.shape(guard) != (1,):
        found = shards.shape(guard) if guard in shards else "nothing"
        raise ArmorError(
            f"{shards.place}: {guard}: found {found}, expected shape (1,), which stops readers without armor; {REMEDY}"
        )


def check_tensor(where: str, name: str, tensor: Tensor, modules: Mapping[str, PackedLinear]) -> None:
    """Check what tensor `name` of file `where` holds: a mask of the pattern, or numbers. Raises ArmorError.

    No tensor may hold NaN; those of compressed linears must be finite, and int8 is never −128. fp8 has no infinity.
    """
    module, _, suffix = name.rpartition(".")
    layout = modules.get(module)
    if tensor.dtype == torch.int8 and layout is not None and tensor.numel():
        if int(tensor.detach().cpu().numpy().min()) < LIMITS["int8"][0]:
            count = int((tensor < LIMITS["int8"][0]).sum())
            raise ArmorError(
                f"{where}: {name}: {count} of {tensor.numel()} numbers are -128, expected -127 to 127; {REMEDY}"
            )
    elif suffix == "core_mask" and layout is not None:
        bad = _row_off_pattern(tensor.cpu(), layout.in_features, layout.pattern)
        if bad is not None:
            raise ArmorError(f"{where}: {name}: row {bad} does not keep {layout.pattern} of its positions; {REMEDY}")
    elif tensor.dtype in (*FLOATS.values(), torch.float8_e4m3fn) and tensor.numel():
        may_be_infinite = module not in modules and tensor.dtype != torch.float8_e4m3fn
        if _magnitude(tensor) > _largest(tensor.dtype) + may_be_infinite:
            count = int((~torch.isfinite(tensor.float())).sum())
            raise ArmorError(f"{where}: {name}: {count} of {tensor.numel()} numbers are NaN or infinite; {REMEDY}")


def _magnitude(tensor: Tensor) -> int:
    """The largest magnitude in a float tensor, as the integer that its bits make: above infinity's lies only NaN.

    As fast as memory, in the calling thread alone: torch's own reductions would share themselves out over all threads,
    and wait for those that are hashing.
    """
    width = tensor.dtype.itemsize
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    positive, negative = int(bits.view(f"i{width}").max()), int(bits.view(f"u{width}").max()) - (1 << 8 * width - 1)
    return max(positive, negative)


@functools.cache
def _largest(dtype: torch.dtype) -> int:
    """That of the largest number; infinity, where there is one, is the next."""
    return _magnitude(torch.tensor([torch.finfo(dtype).max], dtype=dtype, device="cpu"))


@functools.cache
def _byte_table(n: int, m: int, columns: int) -> np.ndarray:
    """Which of the 256 bytes are sound for `columns` positions: n of every m kept, nothing beyond."""
    groups = [(1 << m) - 1 << shift for shift in range(0, columns, m)]
    sound = (all((byte & g).bit_count() == n for g in groups) and byte >> columns == 0 for byte in range(256))
    return np.fromiter(sound, dtype=bool, count=256)


def _row_off_pattern(bits: Tensor, columns: int, pattern: Pattern) -> int | None:
    """The first row of `bits` (out, ceil(columns/8)) uint8 that breaks `pattern` or has bits past the end, or None."""
    n, m = pattern.group(columns)
    if 8 % m == 0:  # no group crosses a byte: look every byte up
        full = columns // 8
        table = _byte_table(n, m, 8)
        if columns % 8 == 0 and table[bits.numpy()].all():
            return None
        sound = table[bits[:, :full].numpy()].all(1)
        if columns % 8:
            sound &= _byte_table(n, m, columns % 8)[bits[:, full].numpy()]
        return None if sound.all() else int((~sound).argmax())
    step = max(ENTRIES // columns, 1)
    for start in range(0, len(bits), step):
        mask = unpack_mask(bits[start : start + step], bits.shape[1] * 8)
        for row in () if is_nm(mask[:, :columns], pattern) and not mask[:, columns:].any() else range(len(mask)):
            if not is_nm(mask[row : row + 1, :columns], pattern) or mask[row, columns:].any():
                return start + row
    return None


def read_packed(shards: Shards, name: str, layout: PackedLinear) -> Factorization:
    """The factors of the compressed linear `name`, checked as they are read. Raises ArmorError if they are broken."""
    tensors = {}
    for suffix in replace(layout, right_of=None).shapes():
        holder = owner(name, suffix, layout.right_of)
        tensor = f"{holder}.{suffix}"
        tensors[suffix] = shards.read(tensor)
        check_tensor(str(shards.folder / shards.file_of(tensor)), tensor, tensors[suffix], {holder: layout})
    return Factorization.of_tensors(tensors, layout.in_features, layout.pattern, layout.quantization)
