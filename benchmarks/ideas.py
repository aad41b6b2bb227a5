"""What else could be done while a decoder layer of a Llama is refined: every idea on one layer of a chain.

    M=runs/refine/results/smollm2-135m
    python -m benchmarks.ideas $M/source.json $M/armor-budget/layers $M/armor-refined/refined --text wiki.valid.raw

The layer starts from its factors in the first folder. It is fed what the refined layers before it, in the second, make
of the text. Each row of IDEAS does one thing otherwise than `refine` does. All are judged alike, on the chain's
held-out sequences: by the output error, by that behind the next layer, dense, and by the KL divergence of a model whose
later layers are dense. The rows are added to benchmarks/ideas.json as they are done.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from armor.config.sources import TextSettings
from armor.config.training import RefineSettings
from armor.core import blockdiag
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.pattern import top_n_mask
from armor.execution.files import read_json, write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine, set_threads
from armor.format.factors import read_factors, read_others
from armor.format.names import layer_file
from armor.methods.armor import armor
from armor.methods.armor_gram import armor_gram
from armor.methods.solver.objective import condition
from armor.methods.solver.settings import SolverSettings
from armor.model.source import open_source
from armor.text.reading import read_blocks
from armor.training.fit import BETAS, fit
from armor.training.refine import output_error
from armor.training.trainable import (
    TrainableLayer,
    TrainableLinear,
    make_trainable,
    multiplied_once,
    put_linears,
    training_arithmetic,
)
from armor.training.tune import kept_predictions, kl_divergence
from benchmarks.quantize import unbalanced

OUTPUT = Path(__file__).with_suffix(".json")
BALANCED = "armor.methods.solver.objective.balanced"
BASIS_STEPS = 10
MOVES = 32  # steps in which a mask may move
RIDGE = 0.1  # of the mean of a Gram matrix's diagonal, under a weight that makes up for its inputs' errors


class Lamb(torch.optim.Adam):
    """LAMB (You et al. 2020, arXiv 1904.00962): Adam's direction, and a step that is a share of the tensor's norm."""

    def step(self, closure: Any = None) -> None:
        groups = [(group["params"][0], group["lr"]) for group in self.param_groups]
        before = [parameter.detach().clone() for parameter, _ in groups]
        super().step(closure)
        for (parameter, rate), old in zip(groups, before, strict=True):
            start = self.state[parameter].setdefault("norm", old.norm())  # the rates have it already
            step = parameter.detach() - old
            scale = math.sqrt(step.numel()) / step.norm().clamp_min(1e-30)
            parameter.data = old + step * (scale * rate * old.norm() / start)


class Muon(torch.optim.Adam):
    """Muon (Jordan et al. 2024) for A and B: the orthogonal part of each block's momentum, as long as Adam's step."""

    def step(self, closure: Any = None) -> None:
        blocks = [group for group in self.param_groups if group["params"][0].dim() == 3]
        before = [group["params"][0].detach().clone() for group in blocks]
        super().step(closure)
        for group, old in zip(blocks, before, strict=True):
            (parameter,) = group["params"]
            left, _, right = torch.linalg.svd(self.state[parameter]["exp_avg"])
            length = (parameter.detach() - old).norm() / math.sqrt(old.shape[0] * old.shape[1])
            parameter.data = old - length * (left @ right)


class Soap(torch.optim.Adam):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321) for A and B: Adam in a basis of each block's own.

    These are the eigenvectors of the running means of G·Gᵀ and Gᵀ·G, G being a block's gradient, found anew every
    BASIS_STEPS steps. Adam's first moment turns with them, the second by the squares of the turn. The first step moves
    no block.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.means: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.bases: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def step(self, closure: Any = None) -> None:
        blocks = [group["params"][0] for group in self.param_groups if group["params"][0].dim() == 3]
        for parameter in blocks:
            self._learn(parameter, parameter.grad)
            left, right = self.bases[parameter]
            parameter.data, parameter.grad = (left.mT @ each @ right for each in (parameter.data, parameter.grad))
            if not self.state[parameter]:  # in the basis of one gradient the rest of it is rounding
                parameter.grad.zero_()
        super().step(closure)
        for parameter in blocks:
            left, right = self.bases[parameter]
            parameter.data = left @ parameter.data @ right.mT

    def _learn(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add a gradient (count, d, d) to the means, and now and then find the bases of rows and columns anew."""
        state, new = self.state[parameter], (gradient @ gradient.mT, gradient.mT @ gradient)
        old = self.means.get(parameter, new)
        rows, columns = (mean.lerp(each, 1 - BETAS[1]) for mean, each in zip(old, new, strict=True))
        self.means[parameter] = rows, columns
        if state and int(state["step"]) % BASIS_STEPS != 1:
            return
        left, right = (torch.linalg.eigh(mean / mean.norm().clamp_min(1e-30)).eigenvectors for mean in (rows, columns))
        if state:
            before = self.bases[parameter]
            turn, back = left.mT @ before[0], before[1].mT @ right
            state["exp_avg"] = turn @ state["exp_avg"] @ back
            state["exp_avg_sq"] = turn.square() @ state["exp_avg_sq"] @ back.square()
        self.bases[parameter] = left, right


@dataclass(frozen=True)
class Idea:
    """What is done otherwise than `refine` does it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    fed: Literal["chain", "dense", "noise", "errors elsewhere"] = "chain"
    mixed: bool = False
    """The target is the mean of the dense states and of what the dense layer makes of the chain's inputs."""
    ahead: bool = False
    """The error behind the next layer is trained."""
    moves: bool = False
    """The mask moves in the first steps."""
    corrected: float | None = None
    """Factors are made again for the chain's inputs, of a weight that makes up for this share of their errors."""
    searched: Literal["", "as stored", "as the search leaves them"] = ""
    """Factors are made again by `armor`, and balanced at the end or not."""
    scaled: bool = False
    """Columns of A and rows of B are multiplied by 2 to the power of a normal number, and S makes up for it."""
    loss: Callable[[Tensor, Tensor], Tensor] = output_error
    optimiser: type[torch.optim.Adam] = torch.optim.Adam

    @property
    def from_stored(self) -> bool:
        """The product of the factors is that of those in the first folder."""
        return self.corrected is None and not self.searched


IDEAS = {
    "as it is": Idea(),
    "160 steps": Idea({"steps": 160}),
    "twice the rate": Idea({"rate": 6e-3}),
    "half of the rate": Idea({"rate": 1.5e-3}),
    "a quarter of the rate": Idea({"rate": 7.5e-4}),
    "steps of one sequence, twice as many": Idea({"batch": 1, "steps": 192}),
    "steps of four sequences, half as many": Idea({"batch": 4, "steps": 48}),
    "32 sequences": Idea({"sequences": 32}),
    "the mean square error": Idea(loss=F.mse_loss),
    "S is not trained": Idea({"core": False}),
    "A and B scaled at random": Idea(scaled=True),
    "mixed targets": Idea(mixed=True),
    "look-ahead": Idea(ahead=True),
    "look-ahead, a quarter of the rate": Idea({"rate": 7.5e-4}, ahead=True),
    "the mask moves": Idea(moves=True),
    "factors made again for the chain's inputs": Idea(corrected=0.0),
    "and for half of their errors": Idea(corrected=0.5),
    "and for half of their errors, 160 steps": Idea({"steps": 160}, corrected=0.5),
    "and for all of their errors": Idea(corrected=1.0),
    "armor's factors": Idea(searched="as stored"),
    "armor's factors, as the search leaves them": Idea(searched="as the search leaves them"),
    "dense inputs": Idea(fed="dense"),
    "dense inputs with noise": Idea(fed="noise"),
    "dense inputs, errors of other tokens": Idea(fed="errors elsewhere"),
    "LAMB, rate 3e-4": Idea({"rate": 3e-4}, optimiser=Lamb),
    "LAMB, rate 1e-3": Idea({"rate": 1e-3}, optimiser=Lamb),
    "LAMB, rate 3e-3": Idea({"rate": 3e-3}, optimiser=Lamb),
    "LAMB, rate 9e-3": Idea({"rate": 9e-3}, optimiser=Lamb),
    "160 steps, half of the rate": Idea({"steps": 160, "rate": 1.5e-3}),
    "SOAP for A and B": Idea(optimiser=Soap),
    "SOAP for A and B, 160 steps": Idea({"steps": 160}, optimiser=Soap),
    "SOAP for A and B, half of the rate": Idea({"rate": 1.5e-3}, optimiser=Soap),
    "Muon for A and B": Idea(optimiser=Muon),
    "Muon for A and B, half of the rate": Idea({"rate": 1.5e-3}, optimiser=Muon),
}


class MovingLinear(TrainableLinear):
    """One whose mask is that of the largest |S| times what B feeds it, in its first MOVES products.

    core_values (out, in) has all of S, and what is not kept has the gradient that it would have if it were. The rate is
    relative to all of it, zeros too, so that of S is 0.7 of what it is otherwise. The mask of the last move stays, also
    where a look before it is the best.
    """

    def __init__(self, given: TrainableLinear, gram: Tensor) -> None:
        factors = given.factors()
        super().__init__(factors, given.bias)
        self.core_values = nn.Parameter(factors.core.float())
        self.first = self.mask = factors.mask
        self.size = gram.diagonal().sqrt()
        if factors.right is not None:
            right = factors.right.float()
            self.size = blockdiag.multiply(right, blockdiag.multiply(right, gram).T).diagonal().sqrt()
        self.moves = MOVES

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        if self.moves and torch.is_grad_enabled():
            self.moves -= 1
            self.mask = top_n_mask(self.core_values.detach().abs() * self.size, self.start.pattern)
        kept = self.core_values * self.mask
        return (self.core_values + (kept - self.core_values).detach() if self.moves else kept), self.mask

    def moved(self) -> float:
        """The share of the kept numbers that were not kept at the start."""
        return float((self.mask & ~self.first).sum() / self.first.sum())


def corrected_weight(weight: Tensor, own: Tensor, cross: Tensor, share: float) -> Tensor:
    """W + α·W(XX̂ᵀ − X̂X̂ᵀ)(X̂X̂ᵀ + a ridge)⁻¹ (out, in), α being the `share` (arXiv 2504.09629).

    weight (out, in), own (in, in) the mean of X̂X̂ᵀ, cross (in, in) that of XX̂ᵀ.
    """
    ridge = RIDGE * own.diagonal().mean() * torch.eye(len(own))
    return weight + share * torch.linalg.solve(own + ridge, (cross - own).T @ weight.T).T


class Bench:
    """One layer, the states around it, and what it is judged by.

    `dense` are the states (sequences, length, hidden) before the layer, behind it and behind the next; `chain` those
    that the refined layers before it make.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokens: Tensor, factors: Path, refined: Path, layer: int, held_out: int
    ) -> None:
        self.layers: Any = model.model.layers
        if not 0 <= layer < len(self.layers) - 1:
            raise ArmorError(f"--layer: found {layer}, expected one of 0 to {len(self.layers) - 2}")
        self.model, self.layer, self.factors, self.held_out = model, layer, factors, held_out
        self.prefix = f"model.layers.{layer}"
        embedded = model.model.embed_tokens(tokens)
        self.positions = model.model.rotary_emb(embedded[:1], torch.arange(tokens.shape[1])[None])
        dense = [embedded]
        for number in progress(range(layer + 2), "dense layers", unit="layers"):
            dense = [*dense[-2:], self.passed(self.layers[number], dense[-1])]
        self.dense = dense
        self.chain = embedded
        for number in progress(range(layer), "refined layers", unit="layers"):
            before = self.trainable(layer_file(refined, number), number)
            with training_arithmetic("cpu"), multiplied_once(before.linears.values()):
                self.chain = self.passed(before.module, self.chain)
        self.predictions = kept_predictions(self.logits(state) for state in dense[2][-held_out:])

    def run(self, layer: nn.Module, state: Tensor) -> Tensor:
        """What `layer` makes of the state (length, hidden) of one sequence."""
        return layer(state[None], position_embeddings=self.positions)[0]

    def passed(self, layer: nn.Module, states: Tensor) -> Tensor:
        """What `layer` makes of the states (sequences, length, hidden)."""
        made = torch.empty_like(states)
        for row, state in zip(made, states, strict=True):
            row.copy_(self.run(layer, state))
        return made

    def logits(self, state: Tensor) -> Tensor:
        """What the dense model makes of a state (length, hidden) behind the next layer: (length, vocabulary)."""
        for layer in self.layers[self.layer + 2 :]:
            state = self.run(layer, state)
        return self.model.lm_head(self.model.model.norm(state))

    def trainable(
        self, file: Path, number: int, factors: Mapping[str, Factorization] | None = None, core: bool = True
    ) -> TrainableLayer:
        """A copy of a layer with the factors in `file`, or those given in their place, and its norms."""
        prefix, layer = f"model.layers.{number}", copy.deepcopy(self.layers[number])
        dtypes = {f"{prefix}.{name}": torch.float32 for name, _ in layer.named_parameters()}
        given = factors or read_factors(file)[0]
        linears = put_linears(layer, lambda name: name.removeprefix(f"{prefix}."), given)
        return make_trainable(layer, prefix, linears, dtypes, read_others(file), core)

    def start(self, idea: Idea) -> TrainableLayer:
        """The layer as an idea starts with it."""
        file = layer_file(self.factors, self.layer)
        factors = read_factors(file)[0]
        if idea.scaled:
            factors = {name: unbalanced(f) if f.left is not None else f for name, f in factors.items()}
        if idea.corrected is not None:
            factors = self.made_again(factors, idea.corrected)
        if idea.searched:
            with nullcontext() if idea.searched == "as stored" else mock.patch(BALANCED, lambda *sides: sides):
                factors = self.made_again(factors, None)
        found = self.trainable(file, self.layer, factors, idea.settings.get("core", True))
        if idea.moves:
            grams = self.grams(found)
            for name, linear in found.linears.items():
                if not linear.start.pattern.is_dense:
                    moving = MovingLinear(linear, grams[name][0])
                    found.module.set_submodule(name.removeprefix(f"{self.prefix}."), moving)
                    found.linears[name] = moving
        return found

    def grams(self, layer: TrainableLayer) -> dict[str, tuple[Tensor, Tensor]]:
        """X̂X̂ᵀ and XX̂ᵀ (in, in) of every linear, the means over tokens that are trained on.

        X̂ is what it is fed in `layer` behind the chain, X what it is fed in the dense model.
        """
        fed: dict[str, list[Tensor]] = {name: [] for name in layer.linears}
        hooks = []
        for module in (layer.module, self.layers[self.layer]):
            for name, inputs in fed.items():
                linear = module.get_submodule(name.removeprefix(f"{self.prefix}."))
                hooks.append(linear.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0][0])))
        sums: dict[str, list[Tensor]] = {}
        for chain, dense in zip(self.chain[: -self.held_out], self.dense[0], strict=False):
            self.run(layer.module, chain)
            self.run(self.layers[self.layer], dense)
            for name, (ours, theirs) in fed.items():
                size = ours.shape[-1]
                both = sums.setdefault(name, [torch.zeros(size, size), torch.zeros(size, size)])
                both[0] += ours.T @ ours
                both[1] += theirs.T @ ours
                fed[name].clear()
        for hook in hooks:
            hook.remove()
        tokens = self.chain[: -self.held_out, :, 0].numel()
        return {name: (own / tokens, cross / tokens) for name, (own, cross) in sums.items()}

    def made_again(self, factors: Mapping[str, Factorization], share: float | None) -> dict[str, Factorization]:
        """Factors for the chain's inputs, with the patterns and block sizes of those given.

        By `armor`, or with a `share`, by `armor_gram`, of weights that make up for that share of these inputs' errors.
        """
        found, grams = {}, self.grams(self.trainable(layer_file(self.factors, self.layer), self.layer))
        for name, given in factors.items():
            (own, cross), wanted = grams[name], self.model.get_submodule(name).weight
            if share is not None:
                wanted = corrected_weight(wanted, own, cross, share)
            if given.left is None:
                found[name] = replace(given, core=torch.where(given.mask, wanted, 0))
                continue
            size, solver = given.left.shape[1], SolverSettings(iterations=300)
            settings: dict[str, Any] = {"pattern": given.pattern, "block_size": size, "solver": solver}
            if share is None:
                found[name] = armor(wanted, own.diagonal(), **settings)
            else:
                found[name] = armor_gram(wanted, own.diagonal(), own, **settings)
        return found

    def fed(self, how: str) -> Tensor:
        """The states (sequences, length, hidden) that an idea trains on."""
        if how == "chain":
            return self.chain
        if how == "dense":
            return self.dense[0]
        generator = torch.Generator().manual_seed(0)
        size = self.dense[0].square().mean(-1, keepdim=True).sqrt()
        errors = (self.chain - self.dense[0]) / size
        trained, held_out = (part.flatten(0, 1) for part in (errors[: -self.held_out], errors[-self.held_out :]))
        if how == "noise":  # of the mean and the covariance that the chain's errors have, relative to each token's size
            root = torch.linalg.cholesky(torch.cov(trained.T) + 1e-9 * torch.eye(trained.shape[1]))
            drawn = torch.randn(errors.shape, generator=generator)
            return self.dense[0] + size * (trained.mean(0) + drawn @ root.T)
        mixed = [part[torch.randperm(len(part), generator=generator)] for part in (trained, held_out)]
        return self.dense[0] + size * torch.cat(mixed).view_as(errors)

    def wanted(self, idea: Idea) -> Tensor:
        """The states (sequences, length, hidden) that an idea trains towards."""
        if idea.ahead:
            return self.dense[2]
        if idea.mixed:
            return (self.dense[1] + self.passed(self.layers[self.layer], self.chain)) / 2
        return self.dense[1]

    @cached_property
    def as_stored(self) -> dict[str, float]:
        """What the layer is judged to be before any training."""
        return self.judged(self.trainable(layer_file(self.factors, self.layer), self.layer))

    def judged(self, layer: TrainableLayer) -> dict[str, float]:
        """The means over the chain's held-out sequences."""
        found: dict[str, list[Tensor]] = {"output_error": [], "behind_the_next": [], "kl": []}
        with multiplied_once(layer.linears.values()):
            for number in range(-self.held_out, 0):
                output = self.run(layer.module, self.chain[number])
                behind = self.run(self.layers[self.layer + 1], output)
                found["output_error"].append(output_error(output, self.dense[1][number]))
                found["behind_the_next"].append(output_error(behind, self.dense[2][number]))
                kept = (self.predictions.tokens[number], self.predictions.log_probabilities[number])
                found["kl"].append(kl_divergence(self.logits(behind), *kept).mean())
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

    def trained(self, name: str, settings: RefineSettings, idea: Idea) -> dict[str, Any]:
        """Train the layer by an idea, and judge it."""
        begun = time.perf_counter()
        layer = self.start(idea)
        prepared = time.perf_counter() - begun
        start = self.as_stored if idea.from_stored else self.judged(layer)
        conditions = [condition(linear.factors()) or 1.0 for linear in layer.linears.values()]
        fed, wanted, behind = self.fed(idea.fed), self.wanted(idea), self.layers[self.layer + 1]
        rows = [*range(settings.sequences), *range(len(fed) - self.held_out, len(fed))]

        def loss(number: int) -> Tensor:
            output = self.run(layer.module, fed[rows[number]])
            return idea.loss(self.run(behind, output) if idea.ahead else output, wanted[rows[number]])

        begun = time.perf_counter()
        with torch.enable_grad(), mock.patch("torch.optim.Adam", idea.optimiser):
            done = fit(
                layer.parameters(),
                layer.dtypes,
                settings,
                loss=loss,
                dtype="float32",
                device="cpu",
                seed=0,
                where=name,
                once=layer.linears.values(),
            )
        seconds = time.perf_counter() - begun
        moving = [linear.moved() for linear in layer.linears.values() if isinstance(linear, MovingLinear)]
        return {
            "settings": settings.model_dump(),
            "start": start,
            "worst_condition": max(conditions),
            "end": self.judged(layer),
            "kept": done.kept,
            "held_out_losses": [look.held_out_loss for look in done.looks],
            "seconds_to_prepare": round(prepared, 1),
            "seconds": round(seconds, 1),
        } | ({"moved": sum(moving) / len(moving)} if moving else {})


def table(rows: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown, in the order of IDEAS; before them the factors as they are stored, where a row starts so."""
    yield "| what | steps | output error | behind the next layer | KL, nats |"
    yield "|---|--:|--:|--:|--:|"
    named = [name for name in IDEAS if name in rows]
    lines = [("the start", 0, rows[name]["start"]) for name in named if IDEAS[name].from_stored][:1]
    lines += [(name, rows[name]["settings"]["steps"], rows[name]["end"]) for name in named]
    for name, steps, found in lines:
        numbers = (found["output_error"], found["behind_the_next"], found["kl"])
        yield f"| {name} | {steps} | " + " | ".join(f"{number:.5f}" for number in numbers) + " |"


@torch.no_grad()
def main(
    source: Annotated[Path, typer.Argument(help="Of a Llama: its source.json or folder.")],
    factors: Annotated[Path, typer.Argument(help="The folder of the factors to start from.")],
    refined: Annotated[Path, typer.Argument(help="The folder of refined layers, for those before.")],
    text: Annotated[Path, typer.Option("--text", help="Plain text, that which the layers were refined on.")],
    layer: Annotated[int, typer.Option("--layer", help="Which decoder layer, from 0; not the last.")] = 17,
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.")] = 1024,
    steps: Annotated[int, typer.Option("--steps", help="Steps, where an idea has no number of its own.")] = 96,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="An idea to try; may be repeated. Unset: all.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads")] = 2,
    output: Path = OUTPUT,
) -> None:
    """Train the layer once for each idea, and print a table."""
    if unknown := set(only or ()) - set(IDEAS):
        raise typer.BadParameter(f"found {'; '.join(unknown)}, expected some of: {'; '.join(IDEAS)}")
    set_threads(threads)
    path, settings = open_source(source).path, RefineSettings(inputs="compressed", steps=steps)
    sequences = settings.sequences + settings.held_out
    tokens = read_blocks(path, TextSettings(files=[str(text)]), sequences, length).tokens
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    bench = Bench(model, tokens, factors, refined, layer, settings.held_out)
    name = f"layer {layer} of {model.config.num_hidden_layers}, {length} tokens"
    for each in only or IDEAS:
        row = bench.trained(each, settings.replace(**IDEAS[each].settings), IDEAS[each])
        row |= {"factors": factors.parent.name, "text": text.name, "machine": current_machine("cpu").model_dump()}
        record = read_json(output) if output.is_file() else {}
        write_json(output, record | {name: record.get(name, {}) | {each: row}})
    print("\n".join(table(read_json(output)[name])))


if __name__ == "__main__":
    typer.run(main)
