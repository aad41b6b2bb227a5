"""Linears that are fed the same tensor may share B: stacked, their weights are one problem with one B.

B costs as many numbers for three linears as for one, and B x is computed once. What is given up is freedom: one B has
to suit all rows. The blocks of A must not reach over the end of a weight, so their size divides the rows of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from armor.config.layers import ModuleSettings, Sharing
from armor.core.blocksizes import block_size_for
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.format.records.topology import Linear
from armor.format.statistics import Statistics
from armor.methods import METHODS
from armor.methods.solver.objective import Objective, relative_loss

__all__ = ["groups_of", "one_linear", "parts_of"]


def groups_of(
    linears: Sequence[Linear], share: Sharing, asked: Mapping[str, ModuleSettings]
) -> list[tuple[list[Linear], ModuleSettings]]:
    """The `linears` of a decoder layer in order, those together that share B, and the settings of each group.

    `asked` are the settings that each can be compressed with. Linears share where `share` says so, they lie in one
    module, are fed the same tensor and have the same settings. Raises ArmorError for a list of `share` that names
    linears of one module which are fed different tensors.
    """
    groups: dict[object, list[Linear]] = {}
    fed: dict[tuple[str, int], Linear] = {}
    for linear in linears:
        parent, _, last = linear.name.rpartition(".")
        listed = 0 if share is True else next((i for i, names in enumerate(share or []) if last in names), None)
        own = asked[linear.name]
        if listed is None or not own.takes("block_size"):
            groups[linear.name] = [linear]
            continue
        first = fed.setdefault((parent, listed), linear)
        if share is not True and first.input_group != linear.input_group:
            raise ArmorError(
                f"settings: share_right: {linear.name} is not fed the same tensor as {first.name}, and cannot share "
                "its B; take it out of the list"
            )
        groups.setdefault((parent, listed, linear.input_group, linear.in_features, own), []).append(linear)
    found = []
    for group in groups.values():
        own = asked[group[0].name]
        size = block_size_for(math.gcd(*(linear.out_features for linear in group)), own.block_size)
        if len(group) > 1 and (size or 0) > 1:
            found.append((group, own.replace(block_size=size)))
        else:
            found += [([linear], own) for linear in group]
    return found


def one_linear(group: Sequence[Linear]) -> Linear:
    """The weights of `group`, one below the other, as one linear under the name of the first."""
    return group[0].replace(out_features=sum(linear.out_features for linear in group))


def parts_of(
    found: Factorization, names: Sequence[str], weights: Sequence[Tensor], of_input: Statistics
) -> list[Factorization] | None:
    """The factors of each of `weights`, by full `names`, out of those of all; each with the losses of its own.

    None where one of them would lose more than NoWag-P does: these had better not share.
    """
    parts = []
    for part, weight in zip(found.split(names, [len(weight) for weight in weights]), weights, strict=True):
        loss = relative_loss(weight, Objective.of(weight, of_input.importance), part)
        start = METHODS["nowag"].run(weight, of_input, ModuleSettings(pattern=str(found.pattern)), 0)
        parts.append(replace(part, loss=loss, start_loss=start.loss))
    return parts if all(part.loss <= part.start_loss for part in parts) else None
