"""Refine and tune for `armor.compress`: the stages' own loops on a model that is in memory, without files.

What is trained are float32 copies, of a decoder layer at a time or of the whole model: whatever goes wrong, the model
stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor.config.recipes import Recipe
from armor.config.training import RefineSettings, TuneSettings
from armor.core.factorization import Factorization
from armor.format.shards import dtype_name
from armor.runtime.calls import Call, State, moved, observe_each
from armor.runtime.skeleton import Skeleton, decoder_layers
from armor.training.refine import fit_layer
from armor.training.trainable import TrainableLayer, make_trainable, multiplied_once, put_linears, training_arithmetic
from armor.training.tune import fit_whole, kept_predictions

__all__ = ["train"]


def train(
    model: PreTrainedModel,
    recipe: Recipe,
    samples: Mapping[str, Tensor],
    factors: dict[str, Factorization],
    seed: int,
    quantize: Callable[[], None],
) -> None:
    """Train `factors`, by full name of the linear, as `recipe` says, and put the trained norms and biases into `model`.

    `samples` are the token sequences (sequences, length) of each stage of training. `quantize()` is called between
    them, where a recipe has that stage, and puts integers in the place of factors.
    """
    prefix, layers = decoder_layers(model, type(model).__name__)
    skeleton = Skeleton(model, layers, prefix)
    others: dict[str, Tensor] = {}
    was_training = model.training
    try:
        model.eval()
        if recipe.refine is not None:
            _refine(skeleton, factors, others, recipe.refine, samples["refine"], seed)
        quantize()
        if recipe.tune is not None:
            _tune(skeleton, factors, others, recipe.tune, samples["tune"], seed)
    finally:
        model.train(was_training)
    with torch.no_grad():
        for name, tensor in others.items():
            model.get_parameter(name).copy_(tensor)


def _trainable(
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    factors: dict[str, Factorization],
    others: dict[str, Tensor],
    core: bool,
) -> TrainableLayer:
    """`layer`, a copy of decoder layer `index`, with trainable linears and in float32."""
    prefix = f"{skeleton.prefix}.{index}"
    named = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
    dtypes = {name: parameter.dtype for name, parameter in named.items() if name not in skeleton.shared}
    device = next(layer.parameters()).device
    own = {n: f for n, f in factors.items() if n.startswith(f"{prefix}.")}
    linears = put_linears(layer, partial(skeleton.inside, index), own)
    return make_trainable(layer.to(device, torch.float32), prefix, linears, dtypes, others, core)


def _keep(layer: TrainableLayer, factors: dict[str, Factorization], others: dict[str, Tensor]) -> None:
    """Put what was trained in a layer, as it is stored, in the place of what was there."""
    found, tensors = layer.stored()
    factors |= found
    others |= tensors


class _Rows(list):
    """States by sequence."""

    def row(self, index: int) -> State:
        return self[index]


def _refine(
    skeleton: Skeleton,
    factors: dict[str, Factorization],
    others: dict[str, Tensor],
    settings: RefineSettings,
    tokens: Tensor,
    seed: int,
) -> None:
    """Train `factors` and `others` layer by layer, as the stage refine does. tokens (sequences, length)."""
    model = skeleton.model
    dtype, device = dtype_name(model.dtype), str(model.device)
    recorded = list(observe_each(skeleton, tokens.to(model.device)))
    dense = _Rows((hidden.cpu(),) for hidden, _ in recorded)
    fed = dense
    for index, layer in enumerate(skeleton.layers):
        calls = [of_layers[index] for _, of_layers in recorded]
        wanted = _outputs(layer, calls, dense, device)
        trained = _trainable(skeleton, index, copy.deepcopy(layer), factors, others, settings.core)
        own = [call.map(lambda x: x.float() if x.is_floating_point() else x) for call in calls]
        if trained.linears:
            fit_layer(trained, fed, wanted, own, settings, seed, f"{skeleton.prefix}.{index}", dtype, device)
            _keep(trained, factors, others)
        dense = wanted
        if settings.inputs == "dense":
            fed = dense
        else:
            with training_arithmetic(device), multiplied_once(trained.linears.values()):
                fed = _outputs(trained.module, own, _Rows(moved(state, "cpu", torch.float32) for state in fed), device)


@torch.no_grad()
def _outputs(layer: nn.Module, calls: Sequence[Call], inputs: _Rows, device: str) -> _Rows:
    """What a decoder layer makes of every sequence's state."""
    return _Rows(moved(call.run(layer, moved(state, device)), "cpu") for state, call in zip(inputs, calls, strict=True))


def _tune(
    skeleton: Skeleton,
    factors: dict[str, Factorization],
    others: dict[str, Tensor],
    settings: TuneSettings,
    tokens: Tensor,
    seed: int,
) -> None:
    """Train `factors` and `others` of all layers at once, as the stage tune does. tokens (sequences, length)."""
    model = skeleton.model
    dtype, device = dtype_name(model.dtype), str(model.device)
    with torch.no_grad():
        logits = (model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in tokens)
        predictions = kept_predictions(logits)
    whole = copy.deepcopy(model).requires_grad_(False)
    layers = [
        _trainable(skeleton, index, layer, factors, others, settings.core)
        for index, layer in enumerate(decoder_layers(whole, skeleton.prefix)[1])
    ]
    fit_whole(whole.float(), layers, tokens, predictions, settings, seed, dtype, device)
    for layer in layers:
        _keep(layer, factors, others)
