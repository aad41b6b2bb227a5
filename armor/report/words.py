"""The summary of a model in words: put together sentence by sentence, each only where the results for it are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from armor.format.provenance import ranges
from armor.format.records.evaluation import EvaluationRecord
from armor.format.trained import trained
from armor.report.numbers import number, percent, plus_minus, size, span
from armor.report.results import ModelResults, RecipeResults, decode_speed

__all__ = ["missing", "notes_on_blocks", "summarize", "unrouted"]


def summarize(model: ModelResults) -> list[str]:
    """Paragraphs: what was lost, what was saved, how sure that is, what is missing."""
    best, rival = model.best(blocks=True), model.best(blocks=False)
    if best is None:
        best, rival = rival, None
    paragraphs = []
    if best:
        paragraphs.append(" ".join(_lost(model, best, rival)))
        paragraphs.append(" ".join(trained(best.layers)) if best.complete else "")
        paragraphs.append(" ".join(_saved(model, best, rival)))
    paragraphs.append(" ".join(_trust(model)))
    paragraphs += unrouted(model)
    if gaps := missing(model):
        paragraphs.append(f"Missing, and left as gaps: {'; '.join(gaps)}.")
    return [paragraph for paragraph in paragraphs if paragraph]


def unrouted(model: ModelResults) -> list[str]:
    """The experts that a calibration sent no token to, a line for each calibration that has some."""
    found = {name: record.unrouted_experts for name, record in model.calibrations.items()}
    return [
        f"{len(experts)} experts saw no token of the calibration {name} and have the statistics of all tokens: "
        f"{'; '.join(_numbered(experts))}."
        for name, experts in found.items()
        if experts
    ]


def _numbered(experts: Sequence[str]) -> list[str]:
    """Names of experts, like model.layers.1.mlp.experts.2, in short: for each mixture its name and their numbers."""
    numbers: dict[str, list[int]] = {}
    for mixture, _, own in (name.rpartition(".") for name in experts):
        numbers.setdefault(mixture, []).append(int(own))
    return [f"{mixture} {ranges(own)}" for mixture, own in numbers.items()]


def missing(model: ModelResults) -> list[str]:
    """The results that were asked for and are not there, by recipe."""
    gaps = []
    for recipe in model.recipes:
        absent = [f"evaluation {name}" for name in recipe.pair.evaluations if name not in recipe.evaluations]
        absent += [f"tasks {name}" for name in recipe.pair.tasks if name not in recipe.tasks]
        absent += [f"benchmark {name}" for name in recipe.pair.benchmarks if name not in recipe.benchmarks]
        absent += [f"benchmark {name}" for name in recipe.pair.serving if name not in recipe.serving]
        if not recipe.dense:
            absent += ["checkpoint"] * (recipe.checkpoint is None) + ["some decoder layers"] * (not recipe.complete)
        if absent:
            gaps.append(f"{recipe.name}: {', '.join(absent)}")
    return gaps


def notes_on_blocks(model: ModelResults) -> list[str]:
    """Where the block size asked for does not divide a dimension or costs more than it saves: which do."""
    notes = []
    for recipe in model.compressed:
        asked, used = recipe.pair.block_size, recipe.block_sizes or ()
        if asked and {*used} - {asked}:
            sizes = " and ".join(map(str, used))
            notes.append(f"{recipe.name}: blocks of {asked} were asked for, {sizes} divide the dimensions.")
        if larger := recipe.larger_than_dense():
            names = ", ".join(larger)
            notes.append(f"{recipe.name}: the blocks make {names} larger than dense; keep them dense, or lower blocks.")
    return notes


def _named(recipe: RecipeResults) -> str:
    """What the recipe is, like "ARMOR (2:4, blocks of 64)", and its name where that says more than the method."""
    details = [f"recipe {recipe.name}"] if recipe.name != recipe.pair.method else []
    details += [recipe.pair.pattern] if "pattern" in recipe.method.settings else []
    if recipe.block_sizes:
        details.append(f"blocks of {span(recipe.block_sizes)}")
    return f"{recipe.pair.title} ({', '.join(details)})" if details else recipe.pair.title


def _perplexity(record: EvaluationRecord) -> str:
    return plus_minus(record.value, record.standard_error)


def _ratio(own: EvaluationRecord, dense: EvaluationRecord) -> str:
    """How many times the dense model's perplexity, and the standard error of that.

    Both models predict the same blocks. So the error is that of the mean of the blocks' differences. It is much smaller
    than the two perplexities' own errors, which say how blocks differ from each other. None is said where the blocks
    differ.
    """
    ratio = own.value / dense.value
    if _conditions(own) != _conditions(dense) or own.blocks < 2:
        return plus_minus(ratio, digits=3)
    differences = [a - b for a, b in zip(own.block_means, dense.block_means, strict=True)]
    return plus_minus(ratio, ratio * stdev(differences) / math.sqrt(len(differences)), digits=3)


def _conditions(record: EvaluationRecord) -> tuple[object, ...]:
    """What evaluations that compare have in common."""
    return record.blocks, record.length, record.made_by.settings


def _lost(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> list[str]:
    own, dense, other = (recipe and recipe.evaluation for recipe in (best, model.dense, rival))
    if own is None:
        return []
    facts = [f"On {own.evaluation}, {_named(best)} has a perplexity of {_perplexity(own)}"]
    facts += [f"the dense model has {_perplexity(dense)}"] if dense else []
    if rival and other:
        kind = "quantization without pruning" if rival.keeps_all else "pruning method"
        facts += [f"the best {kind}, {_named(rival)}, has {_perplexity(other)}"]
    sentences = ["; ".join(facts) + "."]
    if dense:
        second = f"That is {_ratio(own, dense)} times the dense model's"
        second += f", where {rival.pair.title} makes it {_ratio(other, dense)} times" if rival and other else ""
        sentences.append(second + ".")
    if best.kl and best.top1:
        divergence = plus_minus(best.kl.value, best.kl.standard_error, digits=3)
        agreement = percent(best.top1.value, best.top1.standard_error)
        sentences.append(
            f"Its predictions are {divergence} nats from the dense model's (KL divergence), and at {agreement} of the "
            "positions both find the same token the most likely."
        )
    return sentences


def _saved(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> list[str]:
    sentences = [_size(model, best, rival), _bits(model, best, rival), _speed(model, best)]
    return [sentence for sentence in sentences if sentence]


def _size(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> str:
    if (count := best.checkpoint_bytes) is None:
        return ""
    text = f"Its checkpoint takes {size(count)}"
    if whole := model.dense and model.dense.checkpoint_bytes:
        text += f", {count / whole:.0%} of the dense model's {size(whole)}"
    if rival and rival.checkpoint_bytes:
        text += f" ({rival.name}: {size(rival.checkpoint_bytes)})"
    return text + "."


def _bits(model: ModelResults, best: RecipeResults, rival: RecipeResults | None) -> str:
    if best.bits_per_weight is None:
        return ""
    text = f"A weight of its linears takes {best.bits_per_weight:.2f} bits"
    if model.dense and model.dense.bits_per_weight is not None:
        text += f" instead of {model.dense.bits_per_weight:g}"
    if rival and rival.bits_per_weight is not None:
        text += f" ({rival.name}: {rival.bits_per_weight:.2f})"
    return text + "."


def _speed(model: ModelResults, best: RecipeResults) -> str:
    """Beside the dense model in the first benchmark, at the smallest batch size."""
    own = best.benchmark
    if own is None or not own.speedup:
        return ""
    dense = model.benchmarks[best.first_benchmark].dense
    batch = min(own.speedup, key=int)
    return (
        f"Loaded, it holds {size(own.resident_bytes)} of memory beside {size(dense.resident_bytes)}, and "
        f"decoding {'' if batch == '1' else f'{batch} sequences '}in turn with the dense model it writes "
        f"{number(decode_speed(own), 3)} tokens per second in the median, that one {number(decode_speed(dense), 3)}; "
        f"within a turn it is {number(own.speedup[batch].decode.median, 3)} times as fast in the median."
    )


def _trust(model: ModelResults) -> list[str]:
    """How sure the numbers are, and whether they compare."""
    evaluation = next(iter(model.evaluation_names()), None)
    results = [r.evaluations[evaluation] for r in model.recipes if evaluation in r.evaluations]
    if not results:
        return []
    first, sentences = results[0], []
    if first.standard_error is not None:
        sentences.append(f"± is one standard error over {first.blocks} blocks of {first.length:,} tokens.")
    if any(_conditions(record) != _conditions(first) for record in results):
        sentences.append("The recipes were not all measured on the same text or in the same way: compare with care.")
    elif len(results) > 1:
        sentences.append(
            "All recipes were measured on the same blocks, so their ratios are surer than the perplexities."
        )
    return sentences
