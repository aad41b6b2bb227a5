"""What trained a model's factors, in words, from the records of its layers: for the model card and the report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from armor.format.records.layer import LayerRecord, Training, trainings

__all__ = ["trained"]


def trained(records: Sequence[LayerRecord]) -> list[str]:
    """What was trained, on what, for how long, and what that did: a text for each training, none if there was none."""
    linears = [linear for record in records for linear in record.modules.values()]
    named = {"A, B": "block_sizes", "U, V": "rank"}
    around = [names for names, field in named.items() if any(getattr(linear, field) for linear in linears)]
    return [_said(layers, around) for layers in trainings(records)]


def _said(layers: list[Training], around: list[str]) -> str:
    first = max(layers, key=lambda done: (not done.restarts, done.steps))
    lower = ", lower where that was too high" if any(done.restarts for done in layers) else ""
    batch = first.tokens // max(first.steps, 1) // first.length
    how = (
        f"in {first.steps} steps of {batch} sequences of {first.length:,} tokens, out of {first.sequences} of "
        f"{first.text} (Adam, a rate of {first.rate:g} of each tensor's root mean square{lower})"
    )
    core = ["the values of S"] if first.core else []
    norms = ["norms and biases"] if any(done.norms_and_biases for done in layers) else []
    what = ", ".join([*around, *core, *norms])
    verb = "were trained" + (", through the rounding," if any(done.rounded for done in layers) else "")
    if first.stage == "tune":
        return (
            f"Tuned: {what} of the whole model {verb} to predict what the dense one predicts, {how}. KL divergence "
            f"on {first.held_out} held-out sequences: {first.start_loss:.4f} nats before, {first.loss:.4f} after."
        )
    falls = [1 - done.loss / done.start_loss for done in layers if done.start_loss] or [0.0]
    same = sum(not done.kept for done in layers)
    before = ", behind the refined layers before it," if first.inputs == "compressed" else ""
    return (
        f"Refined: {what} of each decoder layer {verb} until its output{before} was close to the dense one's, {how}. "
        f"The output's relative error on {first.held_out} held-out sequences fell by {fmean(falls):.0%} "
        f"in the mean of {len(layers)} layers{f'; {same} stayed as they were' if same else ''}."
    )
