"""`armor.compress`: compress a model that is already in memory, in a notebook say, without files and without Snakemake.

The same statistics, solver and layers as the pipeline's. What is given up is its scale. The whole model is in memory
and runs on the text at once. The linears are done one after the other, each on the device that it is on. Nothing is
kept if the process ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor.command.in_memory_training import train
from armor.config.layers import ModuleSettings, Sharing, check_patterns, sharing_patterns
from armor.config.reading import parse_settings
from armor.config.recipes import Recipe
from armor.config.sample import Sample
from armor.config.sources import TextSettings
from armor.config.training import TrainingStage, check_held_out
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.execution.log import log, progress
from armor.factorize.asked import possible
from armor.factorize.layer import factorize_weight, seed_of
from armor.factorize.quantize import asked_for, quantize_weights, sharing_right
from armor.factorize.sharing import groups_of, parts_of
from armor.format.records.topology import Linear
from armor.format.shards import dtype_name
from armor.format.statistics import Accumulator, Statistics
from armor.model.by_hand import check_linears, left_dense, tell
from armor.model.contents import Contents
from armor.runtime.calls import Call
from armor.runtime.conv1d import turned
from armor.runtime.filling import finite
from armor.runtime.folder import context_length
from armor.runtime.quantizer import pack_linears
from armor.runtime.skeleton import Skeleton, decoder_layers
from armor.text.blocks import blocks

__all__ = ["compress"]

FEW_TOKENS = 8


def compress(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Sequence[str],
    recipe: Recipe | dict,
    *,
    sequences: int = 32,
    sequence_length: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Compress the linears of a causal language model's decoder layers, in place, and return it.

    `tokenizer` is the model's. The inputs' statistics are taken on `text` (one or several documents). It is cut into
    `sequences` blocks of `sequence_length` tokens (unset: 1,024, or the model's context length if that is less).
    `recipe` is one as in a configuration (config/README.md). Its `calibration` is not looked at. With `refine` or
    `tune` the model is trained on the same text, in float32 copies of a layer or of the whole. The model can then
    generate and be saved with save_pretrained, as one that was loaded from a checkpoint. Raises ArmorError, and leaves
    the model as it was, if it cannot be compressed, the text is too short, or a number is NaN or infinite.
    """
    chosen = _recipe(recipe)
    if not isinstance(model, PreTrainedModel):
        raise ArmorError(f"{type(model).__name__}: not a model of transformers; expected a causal language model")
    where = model.name_or_path or type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise ArmorError(f"{where}: the model is quantized already; load it dense")
    with turned(model):
        _compress(model, tokenizer, text, chosen, where, sequences, sequence_length, seed)
    return model


def _compress(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Sequence[str],
    chosen: Recipe,
    where: str,
    sequences: int,
    sequence_length: int | None,
    seed: int,
) -> None:
    """As `compress`, of a model without Conv1D. All that can be wrong is looked for before any work starts."""
    prefix, layers = decoder_layers(model, where)
    linears: dict[str, nn.Linear] = {}
    settings: dict[str, ModuleSettings] = {}
    resolved = [chosen.for_layer(index, seed) for index in range(len(layers))]
    found = _compressible(model, prefix, layers, where)
    chosen.check_model("recipe", found, len(layers))
    for name, module in found.items():
        own = resolved[_layer_of(name, prefix)].for_module(name)
        asked, note = possible(own, module.out_features, module.in_features)
        if note:
            log.warning("%s: %s", name, note)
        if not asked.is_dense:
            linears[name], settings[name] = module, asked
    check_patterns("recipe: share_right", sharing_patterns(chosen.share_right), linears)
    if not linears:
        return
    trainings = _trainings(chosen, sequence_length)
    check_held_out(list(trainings.values()))
    tokens = _tokens(model, tokenizer, text, sequences, sequence_length)
    samples = {
        stage: _tokens(model, tokenizer, text, training.sample.sequences, training.sample.sequence_length)
        for stage, training in trainings.items()
    }
    with_gram = {name for name, asked in settings.items() if asked.takes("gram")}
    inputs, fed = _statistics(model, linears, with_gram, tokens)
    factors = _factors(chosen.share_right, linears, settings, inputs, fed, seed, where)
    train(model, chosen, samples, factors, seed, partial(_quantize, chosen, linears, inputs, factors, prefix))
    pack_linears(model, factors)


def _factors(
    share: Sharing,
    linears: dict[str, nn.Linear],
    settings: dict[str, ModuleSettings],
    inputs: dict[str, Statistics],
    fed: dict[str, int],
    seed: int,
    where: str,
) -> dict[str, Factorization]:
    """The factors of `linears` by name; those that `share` B are one problem."""

    def factorize(weight: Tensor, name: str, asked: ModuleSettings) -> Factorization:
        return factorize_weight(weight, inputs[name], asked, seed_of(seed, name), f"{where}: {name}")

    described = [
        Linear(
            name=name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            dtype=dtype_name(linear.weight.dtype),
            bias=linear.bias is not None,
            shard="",
            input_group=fed[name],
        )
        for name, linear in linears.items()
    ]
    factors: dict[str, Factorization] = {}
    for group, asked in progress(groups_of(described, share, settings), "factorize", unit="linear"):
        names = [linear.name for linear in group]
        weights, parts = [linears[name].weight.detach() for name in names], None
        if len(group) > 1:
            together = factorize(torch.cat(weights), names[0], asked)
            parts = parts_of(together, names, [weight.cpu() for weight in weights], inputs[names[0]])
        if parts is None:
            parts = [factorize(weight, name, settings[name]) for weight, name in zip(weights, names, strict=True)]
        factors |= dict(zip(names, parts, strict=True))
    return {name: factors[name] for name in linears}


def _recipe(given: Recipe | dict) -> Recipe:
    recipe = given if isinstance(given, Recipe) else parse_settings(Recipe, given, "recipe")
    if recipe.budget is not None:
        raise ArmorError("recipe: budget: is for the workflow; put the choices of its budget.json into overrides")
    if recipe.base is not None:
        raise ArmorError(f"recipe: base: there is no recipe {recipe.base} here; say in full how the factors are made")
    return recipe


def _layer_of(name: str, prefix: str) -> int:
    """The number of the decoder layer that a linear is in; `prefix` is the name of their list."""
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def _compressible(model: PreTrainedModel, prefix: str, layers: nn.ModuleList, where: str) -> dict[str, nn.Linear]:
    """The linears of the decoder layers that a recipe may compress, by full name; the same as `armor inspect` finds.

    Warns and refuses as it does. Raises ArmorError too for weights that are not in memory, or not finite.
    """
    check_linears(layers, model, where)
    linears = {
        name: module
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules(prefix=f"{prefix}.{index}")
        if isinstance(module, nn.Linear)
    }
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ArmorError(f"{where}: {name}: is offloaded; load the model without offloading")
        if not finite(linear.weight):
            raise ArmorError(f"{where}: {name}: its weight holds NaN or infinity; load the model again")
    left: dict[str, str] = {}
    contents = Contents()
    with _undisturbed(model):
        calls = _calls(model, layers)
        skeleton = Skeleton(model, layers, prefix)
        for index, layer in enumerate(layers):
            own = left_dense(model, layer, partial(_run, calls.get(index)), skeleton.inside_of(index, skeleton.shared))
            contents.add(layer, own, skeleton.inside_of(index, skeleton.tied))
            left |= {f"{prefix}.{index}.{name}": reason for name, reason in own.items()}
    tell(left, where, is_all=linears.keys() == left.keys())
    if warning := contents.warning():
        log.warning("%s: %s", where, warning)
    return {name: linear for name, linear in linears.items() if name not in left}


def _calls(model: PreTrainedModel, layers: nn.ModuleList) -> dict[int, Call]:
    """What decoder layers are called with, by their number, where the model reads a few tokens."""
    seen: dict[int, Call] = {}

    def note(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(index, Call(args, kwargs))

    hooks = [
        layer.register_forward_pre_hook(partial(note, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        model.base_model(input_ids=torch.arange(FEW_TOKENS, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _run(call: Call | None, layer: nn.Module) -> None:
    if call is not None:  # else the model does not use this layer
        layer(*call.args, **call.kwargs)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """The model evaluates, without gradients, and is then as it was."""
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _quantize(
    recipe: Recipe,
    linears: dict[str, nn.Linear],
    inputs: dict[str, Statistics],
    factors: dict[str, Factorization],
    prefix: str,
) -> None:
    """Put integers in the place of `factors`, by full name of the linear, where `recipe` asks for them."""
    for names in sharing_right(factors) if recipe.quantize else ():
        asked = recipe.quantize and asked_for(recipe.quantize.for_layer(_layer_of(names[0], prefix)), names)
        if asked is not None:
            weights, of_input = [linears[name].weight.detach() for name in names], inputs[names[0]]
            own = {name: factors[name] for name in names}
            how = {"trained": recipe.refine is not None, "to_output": of_input.gram is not None}
            factors |= quantize_weights(weights, of_input, own, asked, **how)


def _trainings(recipe: Recipe, length: int | None) -> dict[str, TrainingStage]:
    """The stages of training, all on the one text that there is."""
    text = TextSettings(files=["text"])
    return {
        stage: TrainingStage(
            f"recipe: {stage}",
            own,
            Sample(text=text, sequences=own.sequences + own.held_out, sequence_length=own.sequence_length or length),
        )
        for stage, own in recipe.training().items()
    }


def _tokens(
    model: PreTrainedModel, tokenizer: Any, text: str | Sequence[str], sequences: int, length: int | None
) -> Tensor:
    """The text as tokens (sequences, length) int64."""
    context = context_length(model.config)
    length = min(1024, context or 1024) if length is None else length
    if sequences < 1 or length < 2:
        raise ArmorError(f"found {sequences} sequences of {length} tokens, expected at least 1 of at least 2")
    if context is not None and length > context:
        raise ArmorError(f"sequence_length: found {length}, but the model's context length is {context}; lower it")
    documents = [text] if isinstance(text, str) else text
    return blocks(iter(documents), tokenizer, sequences, length, "text")


def _statistics(
    model: PreTrainedModel, linears: dict[str, nn.Linear], with_gram: set[str], tokens: Tensor
) -> tuple[dict[str, Statistics], dict[str, int]]:
    """The statistics of each linear's input, by name, and a number of its input, the same for linears that are handed
    the same tensor one after the other. tokens (sequences, length)."""
    fed = _Fed()
    sums = {n: Accumulator(linear.in_features, n in with_gram, linear.weight.device) for n, linear in linears.items()}
    hooks = [linear.register_forward_pre_hook(partial(_add, sums[n], fed, n)) for n, linear in linears.items()]
    try:
        with _undisturbed(model):
            for row in progress(tokens, "calibrate", unit="sequence", amount=tokens.shape[1], amount_unit="tokens"):
                model.base_model(input_ids=row.unsqueeze(0).to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, own in sums.items():
        if own.tokens == 0:
            raise ArmorError(f"{name}: no token came by; the model does not use this linear; name it in keep_dense")
        if not own.finite():
            raise ArmorError(f"{name}: its input holds NaN or infinity; weights or dtype are not fit for this text")
    return {name: own.statistics() for name, own in sums.items()}, fed.numbers


class _Fed:
    """A number for the input of each linear, by name."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._last: tuple[Tensor | None, int] = None, 0  # kept alive: another tensor cannot be it

    def note(self, name: str, x: Tensor) -> None:
        last, number = self._last
        self._last = x, number if x is last else number + 1
        self.numbers.setdefault(name, self._last[1])


def _add(sums: Accumulator, fed: _Fed, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    fed.note(name, args[0])
    sums.add(args[0])
