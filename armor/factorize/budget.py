"""Spend a budget of bits: one choice for each linear, so that the predicted KL divergences add up to the least.

This is a knapsack with a class for each linear, and it is solved exactly (armor.core.knapsack).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from armor.config.budget import BudgetSettings
from armor.core.errors import ArmorError
from armor.core.knapsack import cheapest
from armor.execution.log import log
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.format.names import layer_files
from armor.format.provenance import combined, made_by
from armor.format.records.base import Input
from armor.format.records.budget import BudgetRecord, LinearPrices, Price, PricesRecord

__all__ = ["choose"]


def choose(prices: Path, settings: BudgetSettings, output: Path | str) -> BudgetRecord:
    """Write the choice for every linear to `output`, from the prices of every layer in the folder `prices`.

    Raises ArmorError if there are none, and for a budget that no choice meets or that all of them leave unspent.
    """
    files = layer_files(prices, ".json")
    if not files:
        raise ArmorError(f"{prices}: holds no prices; run armor price first")
    layers = [PricesRecord.read(file) for file in files]
    if len({layer.fingerprint for layer in layers}) > 1:
        raise ArmorError(f"{prices}: holds prices of several models; delete it, and run armor price again")
    linears = {name: linear for layer in layers for name, linear in layer.modules.items()}
    weights = sum(linear.weights for linear in linears.values())
    options = [[(_stored(linear, p), p.predicted_kl) for p in linear.prices] for linear in linears.values()]
    offered = [[bits for bits, _ in own] for own in options]
    settings.check(offered, weights)
    least = sum(map(min, offered))
    picks = cheapest(options, max(int(settings.bits * weights), least))  # the product may be rounded to below the least
    chosen = {name: linear.prices[pick] for (name, linear), pick in zip(linears.items(), picks, strict=True)}
    bits = sum(own[pick][0] for own, pick in zip(options, picks, strict=True)) / weights
    record = BudgetRecord(
        fingerprint=layers[0].fingerprint,
        bits=bits,
        predicted_kl=sum(price.predicted_kl for price in chosen.values()),
        modules={name: _rounded(price) for name, price in chosen.items()},
        seconds=sum(layer.seconds for layer in layers),
        peak_memory_bytes=peak_memory_bytes("cpu"),
        made_by=made_by(__name__, settings, {Input.PRICES: combined(layer.content() for layer in layers)}),
        machine=current_machine(),
    )
    record.write(output)
    counts = Counter(" ".join(f"{k} {v}" for k, v in p.choice.items()) or "unchanged" for p in chosen.values())
    said = ", ".join(f"{count} x {choice}" for choice, count in counts.most_common())
    log.info("%.4g bits per weight, predicted KL %.4g: %s", bits, record.predicted_kl, said)
    return record


def _stored(linear: LinearPrices, price: Price) -> int:
    """The bits of a whole linear."""
    return round(price.bits * linear.weights)


def _rounded(price: Price) -> Price:
    """With as many digits as a person reads."""
    return Price(choice=price.choice, bits=round(price.bits, 3), predicted_kl=float(f"{price.predicted_kl:.4g}"))
