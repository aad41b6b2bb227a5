"""The experts of a mixture as linears of their own, so that each is inspected, compressed and loaded like any other.

transformers keeps all experts of a layer in one module with a few tensors, (expert, out, in), and multiplies with
slices of them. Most checkpoints on the Hub hold a weight for each expert, and transformers fuses them while it loads.
Others hold the fused tensors; their experts get names of the same kind here (`parts_of`). `unfuse` puts a module in the
place of the fused one that transformers calls in the same way: with the tokens, and for each token the numbers of its
experts and what the router gives them. It gathers the tokens of each expert and calls the expert's linears on them.
What lies between the linears is the fused module's own. So dense linears, packed ones and ones in training all work,
and no expert is ever made dense. Of few tokens, as in decoding, the kernel of a CPU takes all experts in one call for
what comes before the activation and one for what comes after.

The price on a GPU is a few small products where transformers has one grouped product.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from armor.format.shards import Part
from armor.runtime.names import Names

__all__ = ["Expert", "Experts", "alike", "fused_experts", "mixtures", "parts_of", "routers", "unfuse"]

TOGETHER = 1024  # rows at most, of all experts, that go through them in one call: more would take memory for nothing
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

    `fused` is that module, without its tensors: it has the activation and the way to combine gate and up. Checkpoints
    have tensors as it had, if `is_stored_fused`.
    """

    def __init__(self, fused: nn.Module, experts: Sequence[Expert], is_stored_fused: bool) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.fused = fused
        self.count, self.is_stored_fused = len(experts), is_stored_fused
        fused._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  for transformers: it has no weight to draw

    def experts(self) -> Iterator[tuple[int, Expert]]:
        """Every expert with its number."""
        for index in range(self.count):
            yield index, self._expert(index)

    def _expert(self, index: int) -> Expert:
        expert = self._modules[str(index)]
        assert isinstance(expert, Expert)
        return expert

    def between(self, *parts: Tensor) -> Tensor:
        """What goes into the down projection, from the outputs of gate and up (tokens, out), or of up alone."""
        fused: Any = self.fused
        if len(parts) == 1:
            return fused.act_fn(parts[0])
        if not hasattr(fused, "_apply_gate"):  # it is no part of the experts interface
            gate, up = parts
            return up * fused.act_fn(gate)
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
        if x.is_meta:  # no token goes to any expert; one shows the shapes, for they are alike
            self._expert(0)(x.clone(), None, self.between)
            return output
        counts = index.flatten().bincount(minlength=self.count)[: self.count].tolist()
        routed = [(self._expert(number), count) for number, count in enumerate(counts) if count]
        order = index.flatten().argsort(stable=True)[: sum(counts)]  # those of no expert are the last
        return self._add(output, x, order // index.shape[-1], weights.flatten()[order, None], routed)

    def _add(
        self, output: Tensor, x: Tensor, tokens: Tensor, given: Tensor, routed: Sequence[tuple[Expert, int]]
    ) -> Tensor:
        """Add to rows of `output` what experts make of the same rows of x, times what is `given` (rows, 1).

        `tokens` (rows,) are the rows of each expert one after the other, `routed` has their number.
        """
        if 0 < len(tokens) <= TOGETHER:
            y = self._together([expert for expert, _ in routed], [count for _, count in routed], x[tokens])
            if y is not None:
                return output.index_add_(0, tokens, (y * given).to(output.dtype))
        start = 0
        for expert, count in routed:
            own = slice(start, start := start + count)
            y = expert(x[tokens[own]], given[own], self.between)
            output.index_add_(0, tokens[own], y.to(output.dtype))
        return output

    def _together(self, experts: Sequence[Expert], counts: Sequence[int], x: Tensor) -> Tensor | None:
        """x (rows, in), the rows of each expert one after the other, through all in two calls into C: (rows, in).

        None where each must be called by itself.
        """
        linears = [[*expert.children()] for expert in experts]
        grouped = getattr(linears[0][0], "grouped", None)  # packed linears have it; dense ones know no such call
        if grouped is None or any(map(_is_hooked, itertools.chain(experts, *linears))):
            return None
        parts = grouped(x, counts, [own[:-1] for own in linears])
        y = parts and grouped(self.between(*parts), counts, [own[-1:] for own in linears])
        return y[0] if y else None


class Sorted(Experts):
    """Experts that are called as Llama 4's: with a copy of all tokens for each, times what the router gives them.

    Rows of tokens that an expert is not given are zeros, and so is what it makes of them.
    """

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As of other experts, but that a token's weight is in it, so that the weights are ones."""
        x = (*args, *kwargs.values())[0]
        x = x.view(self.count, -1, x.shape[-1])  # (expert, token, in)
        index = x.any(-1).int().argmax(0)[:, None]
        return x.sum(0), index, torch.ones_like(index, dtype=x.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # (experts * tokens, in) -> (experts * tokens, in)
        x = (*args, *kwargs.values())[0]
        if x.is_meta:
            self._expert(0)(x.clone(), None, self.between)
            return torch.zeros_like(x)
        given = x.view(self.count, -1, x.shape[-1]).any(-1)  # (expert, token)
        routed = [(self._expert(number), count) for number, count in enumerate(given.sum(1).tolist()) if count]
        rows = given.flatten().nonzero()[:, 0]
        return self._add(torch.zeros_like(x), x, rows, x.new_ones(len(rows), 1), routed)


class WithIdentity(Experts):
    """Experts of LongCat-Flash: numbers from `count` on are those of experts that hand a token on as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # (tokens, in) -> (tokens, in)
        x, index, weights = self.arguments(args, kwargs)
        kept = (weights * (index >= self.count)).sum(-1, keepdim=True)
        return super().forward(x, index, weights) + (x * kept).to(x.dtype)


OF_THEIR_OWN: dict[str, tuple[type[Experts], tuple[bool, ...]]] = {
    "Llama4TextExperts": (Sorted, (True, False, True, True, False)),
    "LongcatFlashExperts": (WithIdentity, (True, False, False, True, False)),
}
"""Fused modules that transformers' experts interface does not know: what stands for them, and their `FLAGS`."""


def _is_hooked(module: nn.Module) -> bool:
    """Whether something looks on when `module` is called, or stands in for its forward, as accelerate's offloading."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _first(fused: nn.Module) -> str:
    """The tensor that comes before the activation."""
    return "gate_up_proj" if fused.has_gate else "up_proj"


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hold several experts in a tensor and are called by transformers' experts interface.

    Those with a norm behind each expert, or with tensors beside the experts', are not among them.
    """
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ in OF_THEIR_OWN:
            for flag, value in zip(FLAGS, OF_THEIR_OWN[type(module).__name__][1], strict=True):
                setattr(module, flag, value)
        flags = [getattr(module, flag, None) for flag in FLAGS]
        if None in flags or flags[-1]:
            continue
        own = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
        expected = {_first(module), "down_proj"}
        expected |= {f"{n}_bias" for n in expected} if flags[1] else set()
        if own == expected:
            found[name] = module
    return found


def alike(layer: nn.Module) -> dict[str, tuple[str, str]]:
    """For each linear of an expert, by its name within `layer`: its expert, and the same linear of the first expert."""
    return {
        f"{path}.{number}.{leaf}": (f"{path}.{number}", f"{path}.0.{leaf}")
        for path, module in layer.named_modules()
        if isinstance(module, Experts)
        for number, expert in module.experts()
        for leaf, _ in expert.named_children()
    }


def mixtures(layer: nn.Module) -> dict[str, int]:
    """The names, within `layer`, of modules that hold experts, and how many each holds."""
    found = {path: module.count for path, module in layer.named_modules() if isinstance(module, Experts)}
    return found | {path: len(module.get_parameter("down_proj")) for path, module in fused_experts(layer).items()}


def routers(layer: nn.Module) -> list[str]:
    """The names, within `layer`, of linears that choose or weigh experts: beside them, with one output for each or one.

    And those that are in a router by name, whatever experts it has. They are small, and what an error in them does is
    out of proportion to that.
    """
    found = [
        name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and "router" in name.split(".")
    ]
    for path, count in mixtures(layer).items():
        above = path.rpartition(".")[0]
        for name, beside in layer.get_submodule(above).named_modules(prefix=above):
            inside = f"{name}.".startswith(f"{path}.")
            if isinstance(beside, nn.Linear) and not inside and beside.out_features in (1, count):
                found.append(name)
    return found


def unfuse(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Put an Experts in the place of each fused module that checkpoints store as it is, or expert by expert.

    Weights are views of the fused tensors where their layout allows it, on their device. Returns the modules that were
    replaced, by name.
    """
    replaced = {}
    if fused := fused_experts(model):
        names = Names(model)
        for path, module in fused.items():
            stored = [_sources(names.converters, f"{path}.{tensor}") for tensor in (_first(module), "down_proj")]
            leaves = _leaves(module, path, stored)
            if leaves is not None:
                model.set_submodule(path, _unfused(module, leaves, stored == [None, None]))
                replaced[path] = module
    return replaced


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The tensors of experts of `model` that checkpoints store fused, by name, as parts of tensors of transformers'."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts) and module.is_stored_fused:
            leaves = dict(module.get_submodule("0").named_children())
            width: Any = leaves[[*leaves][-1]].in_features
            for name, part in _parts(module.fused, [*leaves], module.count, width).items():
                found[f"{path}.{name}"] = replace(part, tensor=f"{path}.{part.tensor}")
    return found


def _sources(converters: Sequence[WeightConverter], tensor: str) -> list[str] | None:
    """The tensors of a checkpoint, with * for the expert's number, that transformers stacks and joins into `tensor`.

    Their order is that in which they are joined. None where it takes `tensor` as it is or turned, nothing where it does
    more.
    """
    for converter in converters:
        back = converter.reverse_transform()
        renamed, pattern = back.rename_source_key(tensor)
        if pattern is not None:
            if [type(step) for step in converter.operations] == [Transpose]:
                return None  # which way it is stored, shapes tell
            if any(type(step) not in (MergeModulelist, Concatenate) for step in converter.operations):
                return []
            return [renamed.replace(back.target_patterns[0], target) for target in back.target_patterns]
    return None


def _leaves(module: nn.Module, path: str, stored: list[list[str] | None]) -> tuple[str, ...] | None:
    """The names of the linears of an expert of the fused module at `path`: gate (if it has one), up, down.

    `stored` are the sources of its two tensors. None where they are stored in another form.
    """
    if stored == [None, None]:
        return ("gate_proj", "up_proj", "down_proj") if module.has_gate else ("up_proj", "down_proj")
    leaves = [name.removeprefix(f"{path}.*.").removesuffix(".weight") for names in stored for name in names or ()]
    is_plain = len(leaves) == (3 if module.has_gate else 2) and not module.is_transposed and not module.has_bias
    return tuple(leaves) if is_plain and not any("." in leaf or "*" in leaf for leaf in leaves) else None


def _parts(fused: nn.Module, leaves: Sequence[str], count: int, width: int) -> dict[str, Part]:
    """The tensors of `count` experts of a fused module, by their name in an Experts, as parts of the module's.

    `width` is the number of inputs of an expert's down projection.
    """
    *first, down = leaves
    halves = [slice(width), slice(width, None)] if fused.is_concatenated else [slice(0, None, 2), slice(1, None, 2)]
    rows = dict(zip(leaves, [*(halves if len(first) == 2 else [slice(None)]), slice(None)], strict=True))
    found = {}
    for expert, leaf in itertools.product(range(count), leaves):
        tensor = "down_proj" if leaf == down else _first(fused)
        weight = Part(tensor, expert, rows[leaf], bool(fused.is_transposed))
        found[f"{expert}.{leaf}.weight"] = weight
        if fused.has_bias:
            found[f"{expert}.{leaf}.bias"] = replace(weight, tensor=f"{tensor}_bias", transposed=False)
    return found


class _Given(nn.Linear):
    """A linear that draws no weight, for it is given one. Of tens of thousands of experts that takes minutes."""

    def reset_parameters(self) -> None:
        pass


def _unfused(fused: nn.Module, leaves: Sequence[str], is_stored_fused: bool) -> Experts:
    """An Experts of the fused module's tensors, which it loses."""
    tensors: Any = {name: fused._parameters.pop(name) for name in tuple(fused._parameters)}
    count, *shape = tensors["down_proj"].shape
    parts = _parts(fused, leaves, count, shape[0 if fused.is_transposed else 1])
    own = {name: part.of(tensors[part.tensor][part.expert]).detach() for name, part in parts.items()}

    def linear(name: str) -> nn.Linear:
        rows, columns = own[f"{name}.weight"].shape
        made = _Given(columns, rows, f"{name}.bias" in own, "meta")
        for kind, _ in list(made.named_parameters()):
            made.register_parameter(kind, nn.Parameter(own[f"{name}.{kind}"], requires_grad=False))
        return made

    experts = [Expert({leaf: linear(f"{expert}.{leaf}") for leaf in leaves}) for expert in range(count)]
    kind, _ = OF_THEIR_OWN.get(type(fused).__name__, (Experts, ()))
    return kind(fused, experts, is_stored_fused)
