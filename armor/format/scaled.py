"""Weights that a model's files hold as small numbers with scales; they are read as bfloat16, tensor by tensor.

Two forms are known. FP8 is that of DeepSeek and Qwen3: a matrix of float8_e4m3fn, and beside it `_scale_inv`, a scale
for every block of 128 × 128 (or `weight_block_size` of config.json) or one for all. MXFP4 is that of gpt-oss: `_blocks`
of 32 numbers of four bits, and `_scales`, a power of two for each. To all stages such a source is a dense model in
bfloat16. What is read is what transformers makes of it when it dequantizes, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from armor.core.errors import ArmorError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPE", "Scaled", "check_quantization", "fp8", "is_scaled", "mxfp4", "scaled_tensors"]

DTYPE = "bfloat16"
"""Of what is read: what these models were trained in, and transformers' own choice."""
BLOCK = (128, 128)
METHODS = ("fp8", "mxfp4")
GROUP = 32  # numbers of a row that share a scale in MXFP4
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three of its four bits; the fourth is the sign


@dataclass(frozen=True)
class Scaled:
    """A weight of `shape`, (out, in) in FP8, (experts, in, out) in MXFP4: the tensors of its numbers and its scales.

    `block` is the size of the blocks of FP8 that share a scale; None in MXFP4.
    """

    numbers: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None


def is_scaled(quantization: object) -> bool:
    """Whether the `quantization_config` of a config.json is of a model whose weights are read as dense ones."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") in METHODS


def check_quantization(quantization: object, where: object) -> None:
    """Raise ArmorError, naming the file as `where`, for a `quantization_config` of a model that is not read."""
    if quantization and not is_scaled(quantization):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise ArmorError(
            f"{where}: the model is quantized ({method}); expected a dense model, or one in {' or '.join(METHODS)}; "
            "take the model that it was made of, often the base_model that its README.md names"
        )


def scaled_tensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], quantization: object, where: Path
) -> dict[str, Scaled]:
    """The weights by name that `tensors`, by name their dtype and shape, hold as numbers and scales.

    `quantization` is the `quantization_config` of config.json. Raises ArmorError, naming the folder as `where`, for
    scales that are missing or do not fit their numbers.
    """
    size = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    block = (size[0], size[1]) if size else BLOCK
    found: dict[str, Scaled] = {}
    for name, (dtype, shape) in tensors.items():
        whole = name.removesuffix("_blocks")
        if name.endswith(".core_values"):  # of this pipeline's own checkpoints, whose scales have other names
            continue
        if dtype == "float8_e4m3fn":
            own, is_known = Scaled(name, f"{name}_scale_inv", shape, block), len(shape) == 2
            expected = [tuple(map(math.ceil, (a / b for a, b in zip(shape, block, strict=False)))), (), (1,)]
        elif name != whole and f"{whole}_scales" in tensors:
            is_known = dtype == "uint8" and len(shape) == 4 and shape[3] == GROUP // 2
            own = Scaled(name, f"{whole}_scales", (shape[0], shape[2] * GROUP, shape[1]) if is_known else (), None)
            expected = [shape[:3]]
        else:
            continue
        if not is_known or own.scales not in tensors or tensors[own.scales][1] not in expected:
            scales = tensors[own.scales][1] if own.scales in tensors else "missing"
            raise ArmorError(
                f"{where}: {name}: {dtype} {shape} with scales {own.scales} {scales}; expected FP8 matrices with a "
                f"scale for each block of {block[0]} x {block[1]}, or MXFP4 experts; take the model's dense release"
            )
        found[whole] = own
    return found


def fp8(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """numbers (out, in) float8 times scales, one for each `block` of them or one for all: (out, in) float32."""
    import torch

    scales, weight = scales.float(), numbers.to(torch.float32)
    if scales.numel() == 1:
        return weight.mul_(scales.view(()))
    for row, of_row in enumerate(scales):
        columns = of_row.repeat_interleave(block[1])[: weight.shape[1]]
        weight[row * block[0] : (row + 1) * block[0]] *= columns
    return weight


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (out, groups, 16) uint8, two numbers a byte, the first in its lower half; scales (out, groups) uint8, the
    exponents plus 127: (in, out) float32, as transformers has experts of this kind."""
    import torch

    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    numbers = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    return torch.ldexp(numbers, (scales.int() - 127)[..., None]).flatten(-2).T
