"""Export: a packed checkpoint multiplied out to a plain dense model, for programs that know nothing of this format.

Every A·S·B is computed in float32 and rounded once; all else is copied. What is stored as integers is multiplied by its
scales first, which is exact. What was lost in compression stays lost. What was saved in bytes is given back: the dense
model is as large as the source. Written shard by shard into a folder that
appears when it is complete (`armor.assemble.folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from armor.assemble.folder import MAX_SHARD_BYTES, copy_others, growing, natural, seal, write_tensors
from armor.core.errors import ArmorError
from armor.core.factorization import SUFFIXES
from armor.execution.files import write_json
from armor.format.checkpoint import check_tensor, read_packed
from armor.format.checksums import Hashing, open_checkpoint, read_checksums
from armor.format.shards import Part
from armor.model.tensors import fused_parts, has_conv1d

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written: how many tensors, how many of them multiplied out, their bytes, the files."""

    tensors: int
    multiplied_out: int
    bytes: int
    files: tuple[str, ...]


def export(
    folder: Path | str, output: Path | str, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Exported:
    """Write the checkpoint in `folder` as a dense model to the folder `output`, which must be absent or empty.

    `dtype` (bfloat16, float16 or float32) is that of all floating-point tensors; None keeps each one's own. Returns a
    summary. Raises ArmorError for a broken checkpoint, an output that is there, numbers too large for `dtype`, or a
    full disk; nothing is left then.
    """
    folder, output = Path(folder), Path(output).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ArmorError(f"{output}: is there already; expected the name of a folder that is new or empty")
    config, shards, modules = open_checkpoint(folder)
    sums = read_checksums(shards)
    Hashing(shards, sums, sums.files if sums else ()).wait()

    is_turned = has_conv1d(folder)
    of_integers = config.get("dtype") or config.get("torch_dtype") or shards.main_dtype()

    def target(name: str) -> torch.dtype:
        own: torch.dtype = getattr(torch, shards.dtype(name))
        module, _, suffix = name.rpartition(".")
        if module in modules and suffix == "core_values" and modules[module].quantization:
            own = getattr(torch, of_integers)
        return getattr(torch, dtype) if dtype and own.is_floating_point else own

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in sorted(shards.names(), key=natural):
        module, _, suffix = name.rpartition(".")
        if module not in modules or suffix not in (*SUFFIXES, "weight"):
            shapes[name], dtypes[name] = shards.shape(name), target(name)
        elif suffix == "core_values":
            weight = f"{module}.weight"
            shape = modules[module].out_features, modules[module].in_features
            shapes[weight] = shape[::-1] if is_turned else shape
            dtypes[weight] = target(name)

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if name != module and module in modules:
            tensor = read_packed(shards, module, modules[module]).reconstruct()
            tensor = tensor.T.contiguous() if is_turned else tensor
        else:
            tensor = shards.read(name)
            check_tensor(str(shards.folder / shards.file_of(name)), name, tensor, modules)
        rounded = tensor.to(dtypes[name])
        if rounded is not tensor and (count := int((rounded.isinf() & tensor.isfinite()).sum())):
            raise ArmorError(
                f"{folder}: {name}: {count} of {tensor.numel()} numbers are too large for {dtype}; take bfloat16 or "
                "float32"
            )
        return rounded

    read_joined = _joined(fused_parts(folder), shapes, dtypes, read)
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    config.pop("quantization_config", None)
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    with growing(output) as part:
        sums = write_tensors(part, sizes, read_joined, max_shard_bytes, "export")
        copy_others(folder, part)
        write_json(part / "config.json", config)
        (part / "README.md").write_text(_card(folder, config), encoding="utf-8")
        files = seal(part, sums)
    return Exported(len(sizes), len(modules), sum(sizes.values()), tuple(sorted(files)))


def _joined(
    parts: Mapping[str, Part],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    read: Callable[[str], Tensor],
) -> Callable[[str], Tensor]:
    """As `read`, but of all experts in one tensor where `parts` says so; changes `shapes` and `dtypes` to it."""
    fused: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        if name in shapes:
            fused.setdefault(part.tensor, {})[name] = part
    for tensor, own in fused.items():
        of_one = [shapes[name] for name, part in own.items() if part.expert == 0]
        block = (sum(rows for rows, *_ in of_one), *of_one[0][1:])
        count, (first, part) = len(own) // len(of_one), next(iter(own.items()))
        shapes[tensor], dtypes[tensor] = (count, *(block[::-1] if part.transposed else block)), dtypes[first]
        for name in own:
            del shapes[name]

    def read_joined(name: str) -> Tensor:
        if name not in fused:
            return read(name)
        tensor = torch.empty(shapes[name], dtype=dtypes[name])
        for own, part in fused[name].items():
            part.put(tensor[part.expert], read(own))
        return tensor

    return read_joined


def _card(folder: Path, config: dict) -> str:
    """README.md: what this is, and what the packed checkpoint's card says was done."""
    card = folder / "README.md"
    _, heading, done = card.read_text(encoding="utf-8").partition("## What was done") if card.is_file() else ("",) * 3
    return CARD.format(model_type=config.get("model_type", "language")) + (f"\n{heading}{done}" if heading else "")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [armor]
---

# A {model_type} model compressed by ARMOR, multiplied out

Each compressed weight matrix is A·S·B (arXiv 2510.05528), multiplied out to a plain dense matrix by ARMOR Pipeline: any
program that reads the source model reads this one, and it is as large.
"""
