"""Packed linears with one input, made ready once for the CPU's kernel.

To gather what C needs of a small linear takes Python longer than C takes to multiply (docs/TRIED.md). So it is
gathered once. A call then looks whether every tensor is still where it was. Tensors are not kept alive here, so that a
model can be offloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

from torch import Tensor, nn

from armor.runtime import cpu, operator
from armor.runtime.operator import Operands

__all__ = ["Ready"]


class Ready:
    """Some `modules` and those that hold their B, as they are now. `operands` are the modules' own, in order.

    `table` multiplies with them while `is_current`. It is None where C cannot: one of the operands is None, or lies
    apart in memory, or is not a tensor of its module but an attribute (in torch's replicas of a module).
    """

    def __init__(
        self, modules: Sequence[nn.Module], holders: Sequence[nn.Module], operands: Sequence[Operands | None], x: Tensor
    ) -> None:
        own = [found for found in operands if found is not None]
        values = [module._parameters.get("core_values") for module in modules]
        whole = len(own) == len(modules) and all(
            operator.contiguous(found) is found and found.values is held
            for found, held in zip(own, values, strict=True)
        )
        self.table = cpu.Table(own, x.shape[-1]) if whole else None
        self._dtype, self._owners = x.dtype, [module._parameters for module in modules]
        self._held = [held for module in (*modules, *holders) for held in (module._parameters, module._buffers)]
        self._addresses = self._now()

    def _now(self) -> list[int]:
        """Where each tensor lies. One that took the place of another is as good, if it lies where that one did."""
        return [tensor.data_ptr() for held in self._held for tensor in held.values() if tensor is not None]

    def is_current(self, modules: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether this is what `modules` hold now, for what is like x."""
        owners = [module._parameters for module in modules]
        if self._dtype != x.dtype or len(owners) != len(self._owners):
            return False
        return all(map(is_, owners, self._owners)) and self._now() == self._addresses
