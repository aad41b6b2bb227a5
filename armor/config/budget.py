"""Settings of a budget of bits: what each linear may become, and how that is priced."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

from pydantic import Field

from armor.config.layers import Choice, LayerSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.methods import DEFAULT, METHODS, UNCHANGED

__all__ = ["BudgetSettings", "PriceSettings"]


class BudgetSettings(Typed):
    """Bits to spend. The choices for the linears are those that together cost the least predicted KL divergence.

    A linear whose bits `overrides` or `keep_dense` decide stays as they say, and its bits count.
    """

    bits: float = Field(gt=0)
    """The stored bits per weight of all linears together, in the mean and at most: the report's bits/weight."""
    over: list[Choice] = Field(
        default=[
            *(Choice(block_size=d) for d in (16, 32, 64, 128)),
            *(Choice(method=name) for name in (METHODS[DEFAULT].instead, UNCHANGED)),
        ],
        min_length=1,
    )
    """What each linear may become. Unset: blocks of 16, 32, 64 and 128, nowag, dense."""
    sequences: int = Field(default=8, ge=1)
    """How many token sequences of the recipe's calibration the sensitivities are measured on."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in each; unset: as the calibration says, or else the model's context length."""
    iterations: int = Field(default=30, ge=3)
    """The solver's iterations where a choice is tried: once with these and once with a third of them. The cost at the
    recipe's iterations is extrapolated from the two."""

    def check(self, offered: Sequence[Sequence[int]], weights: int) -> None:
        """Raise ArmorError unless some choices meet `bits`, and not all of them leave some unspent.

        `offered` are the bits that the choices for each linear take, `weights` the entries of all of them.
        """
        least, most = (sum(map(pick, offered)) for pick in (min, max))
        if not least / weights <= self.bits <= most / weights:
            raise ArmorError(
                f"budget.bits: found {self.bits:g}, but the choices in over take {ceil(1e3 * least / weights) / 1e3:g} "
                f"to {floor(1e3 * most / weights) / 1e3:g} bits per weight in the mean; set bits between them, or "
                "offer other choices"
            )


class PriceSettings(LayerSettings):
    """A recipe resolved for one decoder layer, whose choices are priced."""

    iterations: int = Field(ge=3)
    """The solver's iterations where a choice is tried."""
