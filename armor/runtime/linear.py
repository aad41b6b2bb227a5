"""The module that stands in for a compressed linear: y = A S B x + U V x + b, in cheap steps.

It holds the packed tensors of the checkpoint, and `state_dict` is always those. On a CPU the kernel of
`armor.runtime.cpu` multiplies with them as they are, on a CUDA device those of `armor.runtime.cuda`. Elsewhere (another
device or dtype, no compiler at installation, no Triton) dense matrix products do. The module then unpacks its core
in every forward pass and keeps nothing. `unpack` trades the packed values for the dense core, in the same dtype. It is
then as fast as a dense linear but for the blocks. It takes the memory of a dense linear plus one bit a weight and
the blocks. The packed values are recovered exactly: core[mask].

Where the checkpoint is quantized the module holds its numbers, and their scales in its own dtype. Kernels multiply with
these numbers. What runs through dense products multiplies them out first, in float32, and rounds once to that dtype.

A low-rank pair, U and V, is two plain products beside these.

The tensors are frozen: gradients flow through the module to its input and to adapters, not into the factors.

To whoever asks it is an nn.Linear, for that is what libraries look for that do something with linears (PEFT puts its
adapters on them). It has no dense weight, though: `weight` tells where and in which dtype it computes. All else
that is asked of it is one clear error instead of numbers that would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armor.core.factorization import SUFFIXES, Factorization, owner
from armor.core.integers import DTYPES, pack_int4
from armor.core.packing import unpack_mask
from armor.format.checkpoint import PackedLinear
from armor.runtime import cpu, integers, operator
from armor.runtime.no_weight import NoWeight, NoWeightError
from armor.runtime.operator import Operands
from armor.runtime.product import gathered, multiply, supports, through
from armor.runtime.ready import Ready

__all__ = ["ArmorLinear", "know_each_other"]

_FP8 = DTYPES["fp8"]


class _Beside:
    """What a linear knows of those beside it, and keeps from one call to the next.

    No part of nn.Module, which would take them for parts of the linear, and takes microseconds to set an attribute.
    """

    def __init__(self) -> None:
        self.holder: ArmorLinear | None = None  # of its B
        self.followers: tuple[ArmorLinear, ...] = ()  # handed the same input after it, as far as is known
        self.ready: Ready | None = None
        self.ahead: tuple[Tensor, int, Tensor] | None = None  # an input, its version, and the output for it
        self.goes_apart = False  # was handed something else

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles have their tensors elsewhere
        return self.__dict__ | {"ready": None, "ahead": None}


class ArmorLinear(nn.Linear):
    """A linear of the given `layout`, its tensors empty until a checkpoint or `load` fills them.

    Parameters core_values (out, in·n/m), left (out/d, d, d) or None, right (in/d, d, d) or None, bias (out,) or None;
    buffer core_mask (out, ceil(in/8)) uint8, None where all is kept. If quantized also the parameters core_scales
    (out, groups), left_scales (out,) and right_scales (in,). With a pair of low rank also up (out, rank) and down
    (rank, in). After `unpack`, core (out, in) stands in for core_values; it is what these were. With
    `hide_packed` the state dict lacks the packed tensors, so that no loader looks for them. A linear that shares the B
    of another has no `right` of its own, but must know the other (`know_each_other`). `of_conv1d`: a Conv1D was in its
    place.
    """

    hide_packed = of_conv1d = False
    core_values: nn.Parameter | None
    core_scales: nn.Parameter | None
    core_mask: Tensor | None
    core: Tensor
    left: nn.Parameter | None
    left_scales: nn.Parameter | None
    right: nn.Parameter | None
    right_scales: nn.Parameter | None
    up: nn.Parameter | None
    down: nn.Parameter | None
    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]  torch's own may be None too

    def __init__(
        self,
        layout: PackedLinear,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self._is_hf_initialized = True  # for transformers, which would draw a weight at random
        self.layout = layout
        self.beside = _Beside()
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.group = layout.pattern.group(layout.in_features)[1]
        shapes, dtypes = layout.shapes(), layout.dtypes()
        for name in SUFFIXES:
            kind = getattr(torch, dtypes[name]) if name in dtypes else dtype
            empty = torch.empty(shapes[name], device=device, dtype=kind) if name in shapes else None
            if name == "core_mask":
                self.register_buffer(name, empty)
            else:
                self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        empty = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def of(cls, factors: Factorization, bias: Tensor | None = None) -> ArmorLinear:
        """The module of a factorization and the linear's bias (out,), in their dtype, on their device."""
        with torch.device("meta"):
            linear = cls(PackedLinear.of(factors), bias is not None)
        tensors = factors.tensors() | ({} if bias is None else {"bias": bias})
        linear.load_state_dict({name: t.detach().clone() for name, t in tensors.items()}, assign=True)
        return linear

    def forward(self, input: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = self._without_pair(input)
        if not self.layout.rank:
            return y
        assert self.up is not None and self.down is not None
        return y + F.linear(F.linear(input, self.down), self.up)

    def _without_pair(self, input: Tensor) -> Tensor:
        """A S B x + b."""
        beside = self.beside
        if (ahead := beside.ahead) is not None:
            beside.ahead = None
            if ahead[0] is input and ahead[1] == input._version:
                return ahead[2]
            beside.goes_apart = True
        if (output := self._at_once(input)) is not None:
            return output
        if self.core_values is not None:
            return multiply(self.layout, input, *self._tensors())
        factors, own = self._factors().in_floats(), self.weight.dtype
        core, left, right = (None if t is None else t.to(own) for t in (factors.core, factors.left, factors.right))
        assert core is not None
        return through(input, core, left, right, self.bias)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The output for x by one call into C, which multiplies for the followers too. They return theirs when x comes
        to them; one that was not handed it follows no more. None where C cannot, or a gradient or a compiler must see
        how."""
        if not _is_plain(x):
            return None
        own = self.beside
        if any([f.beside.goes_apart or f.beside.ahead is not None for f in own.followers]):
            self._let_others_go()
        followers = () if x.is_inference() else own.followers  # such a tensor can change unseen
        table = self._table((self, *followers), x)
        if table is None:
            own.followers = ()
        if table is None or not table.takes(x):
            return None
        first, *others = table.apart(x)
        for linear, output in zip(followers, others, strict=True):
            linear.beside.ahead = x, x._version, output
        return first

    def _let_others_go(self) -> None:
        """Keep the followers that took what was computed for them."""
        for linear in (followers := self.beside.followers):
            if linear.beside.ahead is not None:
                linear.beside.ahead, linear.beside.goes_apart = None, True
        self.beside.followers = tuple(linear for linear in followers if not linear.beside.goes_apart)

    def _table(self, group: Sequence[ArmorLinear], x: Tensor) -> cpu.Table | None:
        """What multiplies x with `group`, of which this is the first; None where C cannot."""
        ready = self.beside.ready
        if ready is None or not ready.is_current(group, x):
            holders = [linear.beside.holder for linear in group if linear.beside.holder is not None]
            ready = self.beside.ready = Ready(group, holders, [linear._operands(x) for linear in group], x)
        return ready.table

    def _operands(self, x: Tensor) -> Operands | None:
        """What the CPU's kernel multiplies x with, but for the pair of low rank; None where it cannot."""
        own = gathered(self.layout, *self._tensors())
        return own if own is not None and x.device.type == "cpu" and supports(self.layout, x, own) else None

    @staticmethod
    def grouped(x: Tensor, counts: Sequence[int], linears: Sequence[Sequence[nn.Module]]) -> list[Tensor] | None:
        """x (rows, in) through other linears for each group of its rows, in one call into C: see `cpu.grouped`.

        None where each linear must be called by itself: one that is not packed for the CPU or has a pair of low rank,
        and where a gradient or a compiler needs each call.
        """
        if not _is_plain(x) or not cpu.is_grouped(x, counts):
            return None
        tables: list[list[cpu.Table]] = []
        for group in linears:
            tables.append([])
            for linear in group:
                if type(linear) is not ArmorLinear or linear.layout.rank:
                    return None
                table = linear._table((linear,), x)
                if table is None:
                    return None
                tables[-1].append(table)
        return cpu.grouped(x, counts, tables)

    @property
    def weight(self) -> NoWeight:
        """Device, dtype and shape of the weight that is not there; see the module's docstring."""
        held = self.core if self.core_values is None else self.core_values
        if self.core_scales is not None:
            held = self.core_scales
        return NoWeight(held.device, held.dtype, (self.out_features, self.in_features))

    @weight.setter
    def weight(self, value: NoWeight) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]  it is no tensor
        if not isinstance(value, NoWeight):  # PEFT hands a linear its own when it takes an adapter off
            raise NoWeightError("an ArmorLinear takes no dense weight; call the model's dequantize() first")

    def dense_core(self) -> Tensor:
        """S, dense (out, in), in the linear's dtype."""
        return self._factors().in_floats().core.to(self.weight.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """A·S·B + U·V multiplied out, (out, in), in `dtype` (None: the linear's own), in float32 at least till then."""
        own = self.weight.dtype
        return self._factors().reconstruct(torch.promote_types(own, torch.float32)).to(dtype or own)

    def _tensors(self) -> tuple[Any, ...]:
        """What `multiply` takes behind x."""
        scales = (self.core_scales, self.left_scales, self.held("right_scales"))
        return (self.core_values, self.core_mask, self.left, self.held("right"), self.bias, *scales)

    def held(self, name: str) -> Tensor | None:
        """B (`right`) or its scales (`right_scales`), which another linear may hold."""
        if self.layout.right_of is None:
            return getattr(self, name)
        holder = self.beside.holder
        if holder is None:
            raise RuntimeError(f"shares the B of {self.layout.right_of}, which is not there; call know_each_other")
        tensor = getattr(holder, name)
        if tensor is not None and tensor.is_meta and (hook := getattr(holder, "_hf_hook", None)) is not None:
            return hook.weights_map[name].to(self.weight.device)  # accelerate has offloaded it
        return tensor

    def _factors(self) -> Factorization:
        """What the linear holds."""
        own = self.layout
        right, right_scales = self.held("right"), self.held("right_scales")
        others = {"left": self.left, "right": right, "up": self.up, "down": self.down, "core_scales": self.core_scales}
        others |= {"left_scales": self.left_scales, "right_scales": right_scales}
        tensors: dict[str, Any] = {name: t for name, t in others.items() if t is not None}
        if self.core_values is None:
            unread = torch.empty(0, dtype=torch.bool)  # the mask: nothing here asks for it
            return Factorization(self.core, unread, own.pattern, quantization=own.quantization, **tensors)
        tensors["core_values"] = self.core_values
        if self.core_mask is not None:
            tensors["core_mask"] = self.core_mask
        return Factorization.of_tensors(tensors, self.in_features, own.pattern, own.quantization)

    @property
    def is_unpacked(self) -> bool:
        """Whether `core` is there and core_values is None, or the other way round."""
        return "core" in self._buffers

    @property
    def runs_packed(self) -> bool:
        """Whether a kernel multiplies with the packed values, where and as they are now."""
        own = gathered(self.layout, *self._tensors())
        if own is None:
            values = self.core_values
            return values is not None and values.device.type == "cpu" and integers.is_whole(self.layout)
        return supports(self.layout, own.values if own.core_scales is None else own.core_scales, own)

    @torch.no_grad()
    def unpack(self) -> ArmorLinear:
        """Keep the dense core instead of the packed values, to compute faster. Offloaded linears stay as they are."""
        masked = self.core_mask is None or not self.core_mask.is_meta
        if self.core_values is not None and not self.core_values.is_meta and masked:
            self.register_buffer("core", self._factors().core, persistent=False)
            self.core_values = None
        return self

    def pack(self) -> ArmorLinear:
        """Undo `unpack`: back to the packed values."""
        if self.is_unpacked:
            self.core_values = nn.Parameter(self._packed_values(), requires_grad=False)
            del self.core
        return self

    def _packed_values(self) -> Tensor:
        values, own = self.core, self.layout
        if self.core_mask is not None:
            values = values[unpack_mask(self.core_mask, self.in_features)].view(self.out_features, -1)
        return pack_int4(values) if own.quantization is not None and own.quantization.core == "int4" else values

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.hide_packed:
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_unpacked:
            destination[f"{prefix}core_values"] = self._packed_values()

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  the rest goes on as it came
        self, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        was_unpacked = self.is_unpacked
        super(ArmorLinear, self.pack())._load_from_state_dict(state_dict, prefix, *args)
        if was_unpacked:
            self.unpack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ArmorLinear:
        """fp8 moves as bytes: a new dtype is for the floats that compute, not for these."""

        def moved(tensor: Tensor) -> Tensor:
            if tensor.dtype != _FP8:
                return fn(tensor)
            found = fn(tensor.view(torch.uint8))
            return found.view(_FP8) if found.dtype == torch.uint8 else tensor

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        layout = self.layout
        blocks = f"left_block_size={layout.left_block_size}, right_block_size={layout.right_block_size}"
        more = {"right_of": layout.right_of, "rank": layout.rank}
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, pattern={layout.pattern}, {blocks}, "
            f"bias={self.bias is not None}" + (f", {layout.quantization}" if layout.quantization else "")
        ) + "".join(f", {key}={value}" for key, value in more.items() if value)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing but numbers is asked of a product with x on a CPU: no gradient, no compiler, no subclass."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not operator.is_needed(x, None)


def know_each_other(model: nn.Module) -> None:
    """Let the packed linears below `model` find the ones beside them: who holds their B, and who may have their input.

    Of those of one module with as many inputs the first multiplies for the others too, until they turn out to be handed
    something else: o_proj may be as wide as q_proj, but comes after the attention.
    """
    for name, module in model.named_modules():
        if isinstance(module, ArmorLinear) and module.layout.right_of:
            holder: Any = model.get_submodule(owner(name, "right", module.layout.right_of))
            module.beside.holder = holder
        by_width: dict[int, list[ArmorLinear]] = {}
        for child in module.children():
            if isinstance(child, ArmorLinear):
                by_width.setdefault(child.in_features, []).append(child)
        for first, *others in by_width.values():
            first.beside.followers = tuple(others)
