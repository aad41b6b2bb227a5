"""The experts of a mixture as linears of their own, so that each is inspected, compressed and loaded like any other.

transformers keeps all experts of a layer in one module with two or three tensors, (expert, out, in), and multiplies
with slices of them. Most checkpoints on the Hub hold a weight for each expert, and transformers fuses them while it
loads. `unfuse` puts a module in the place of the fused one that transformers calls in the same way: with the tokens,
and for each token the numbers of its experts and what the router gives them. It gathers the tokens of each expert and
calls the expert's linears on them. What lies between the linears is the fused module's own. So dense linears, packed
ones and ones in training all work, and no expert is ever made dense.

The price on a GPU is a few small products where transformers has one grouped product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from armor.runtime.names import Names

__all__ = ["Expert", "Experts", "fused_experts", "routers", "unfuse"]

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


class Expert(nn.Module):
    """One expert: its linears under the names that checkpoints have for them, gate (or None), up and down.

    While it runs, `weights` (tokens, 1) is what the router gives the tokens that pass, or None.
    """

    weights: Tensor | None = None

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor, weights: Tensor | None, between: Callable[..., Tensor]) -> Tensor:
        """x (tokens, in) -> (tokens, in), each token multiplied by its weight."""
        self.weights = weights
        *first, down = (self.get_submodule(name) for name in self._names)
        y = down(between(*(linear(x) for linear in first)))
        self.weights = None
        return y if weights is None else y * weights


class Experts(nn.Module):
    """The experts of one mixture, as modules 0, 1, ..., called as transformers' fused module is.

    `fused` is that module, without its tensors: it has the activation and the way to combine gate and up.
    """

    def __init__(self, fused: nn.Module, experts: Sequence[Expert]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.fused = fused
        self.count = len(experts)
        fused._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  for transformers: it has no weight to draw

    def experts(self) -> Iterator[tuple[int, Expert]]:
        """Every expert with its number."""
        for index in range(self.count):
            expert = self.get_submodule(str(index))
            assert isinstance(expert, Expert)
            yield index, expert

    def between(self, *parts: Tensor) -> Tensor:
        """What goes into the down projection, from the outputs of gate and up (tokens, out), or of up alone."""
        fused: Any = self.fused
        if len(parts) == 1:
            return fused.act_fn(parts[0])
        joined = torch.cat(parts, -1) if fused.is_concatenated else torch.stack(parts, -1).flatten(-2)
        return fused._apply_gate(joined)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (tokens, in), the numbers of their experts and the weights of these (tokens, k), as it is called."""
        if kwargs:
            args = inspect.signature(type(self.fused).forward).bind(self.fused, *args, **kwargs).args[1:]
        x, index, weights = args
        return x, index, weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # (tokens, in) -> (tokens, in)
        x, index, weights = self.arguments(args, kwargs)
        output = torch.zeros_like(x)
        if x.is_meta:  # no token goes to any expert: all go to each, for the shapes
            for _, expert in self.experts():
                expert(x.clone(), None, self.between)
            return output
        numbers = index.flatten()
        counts = numbers.bincount(minlength=self.count)[: self.count].tolist()
        order, given, start = numbers.argsort(stable=True), weights.flatten(), 0
        for number, expert in self.experts():
            if counts[number]:
                places = order[start : start + counts[number]]
                start += counts[number]
                tokens = places // index.shape[-1]
                y = expert(x[tokens], given[places, None], self.between)
                output.index_add_(0, tokens, y.to(output.dtype))
        return output


def _first(fused: nn.Module) -> str:
    """The tensor that comes before the activation."""
    return "gate_up_proj" if fused.has_gate else "up_proj"


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hold several experts in a tensor and are called by transformers' experts interface.

    Those with a norm behind each expert, or with tensors beside the experts', are not among them.
    """
    found = {}
    for name, module in model.named_modules():
        flags = [getattr(module, flag, None) for flag in FLAGS]
        if None in flags or flags[-1]:
            continue
        own = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
        expected = {_first(module), "down_proj"}
        expected |= {f"{n}_bias" for n in expected} if flags[1] else set()
        if own == expected:
            found[name] = module
    return found


def routers(layer: nn.Module) -> list[str]:
    """The names, within `layer`, of linears that choose or weigh experts: beside them, with one output for each or one.

    They are small, and what an error in them does is out of proportion to that.
    """
    found = []
    for path, module in layer.named_modules():
        if isinstance(module, Experts):
            above = path.rpartition(".")[0]
            for name, beside in layer.get_submodule(above).named_modules(prefix=above):
                inside = f"{name}.".startswith(f"{path}.")
                if isinstance(beside, nn.Linear) and not inside and beside.out_features in (1, module.count):
                    found.append(name)
    return found


def unfuse(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Put an Experts in the place of each fused module whose experts checkpoints store one by one.

    Weights are views of the fused tensors, on their device. Returns the modules that were replaced, by name.
    """
    replaced = {}
    if fused := fused_experts(model):
        names = Names(model)
        for path, module in fused.items():
            leaves = _leaves(names.converters, path, module)
            if leaves is not None:
                model.set_submodule(path, _unfused(module, leaves))
                replaced[path] = module
    return replaced


def _leaves(converters: Sequence[WeightConverter], path: str, module: nn.Module) -> tuple[str, ...] | None:
    """What checkpoints call the linears of an expert of the fused module at `path`: gate (if it has one), up, down.

    None where they do not store experts one by one.
    """
    found: list[str] = []
    for tensor, count in ((_first(module), 2 if module.has_gate else 1), ("down_proj", 1)):
        full = f"{path}.{tensor}"
        sources = next(filter(None, (_sources(converter, full) for converter in converters)), [])
        leaves = [source.removeprefix(f"{path}.*.").removesuffix(".weight") for source in sources]
        if len(leaves) != count or any("." in leaf or "*" in leaf for leaf in leaves):
            return None
        found += leaves
    return tuple(found)


def _sources(converter: WeightConverter, tensor: str) -> list[str]:
    """The tensors, with * for the expert's number, that a converter stacks and joins into `tensor` and does no more to.

    Their order is that in which they are joined; none if it makes another tensor, or makes it otherwise.
    """
    if any(type(step) not in (MergeModulelist, Concatenate) for step in converter.operations):
        return []
    back = converter.reverse_transform()
    renamed, pattern = back.rename_source_key(tensor)
    if pattern is None:
        return []
    return [renamed.replace(back.target_patterns[0], target) for target in back.target_patterns]


def _unfused(module: nn.Module, leaves: Sequence[str]) -> Experts:
    """An Experts of the fused module's tensors, which it loses."""
    tensors = {name: module._parameters.pop(name) for name in tuple(module._parameters)}
    count = tensors["down_proj"].shape[0]  # pyright: ignore[reportOptionalMemberAccess]  its parameters are there

    def parts(expert: int, suffix: str) -> list[Tensor | None]:
        first, down = (tensors.get(f"{name}{suffix}") for name in (_first(module), "down_proj"))
        if first is None or down is None:
            return [None] * len(leaves)
        both = first[expert], down[expert]
        one, last = (t.T for t in both) if not suffix and module.is_transposed else both
        if len(leaves) == 2:
            return [one, last]
        halves = one.chunk(2) if module.is_concatenated else (one[::2], one[1::2])
        return [*halves, last]

    def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        made.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made

    experts = [
        Expert({n: linear(w, b) for n, w, b in zip(leaves, parts(e, ""), parts(e, "_bias"), strict=True)})  # pyright: ignore[reportArgumentType]  weights are there
        for e in range(count)
    ]
    return Experts(module, experts)
