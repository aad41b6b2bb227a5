"""The loop that refine and tune share: Adam, a look at held-out sequences now and then, the best look kept.

Every tensor has a rate of its own, relative to the root mean square that it starts with. So one number serves all
families and both sides of A·S·B. A U that starts at zero, as LoRA's does, takes that of its V.

What is kept is what the best look saw, rounded to the dtype that it is stored in, and the first look is before the
first step. So the held-out loss of what is stored is never above that of the start.

A rate that suits most layers may be too high for one. Where the loss diverges, or no look is better, the training
begins again from the best look at a quarter of the rate, twice at most.

At every look all that the loop needs goes to disk, so that a run that was killed goes on there and ends, on a CPU, with
the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from armor.config.training import TrainingSettings
from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.files import open_safetensors, room_for, save_safetensors
from armor.execution.log import log, progress
from armor.execution.resume import Steps
from armor.format.records.layer import Look
from armor.training.trainable import (
    TrainableLinear,
    multiplied_once,
    rounded,
    stored_arithmetic,
    training_arithmetic,
)

__all__ = ["Fit", "fit", "share_of_rate"]

LOOKS = 8
DIVERGED = 2.0  # times the held-out loss at the start
TRIES = 3
LOWER = 0.25  # of the rate, from one try to the next
BETAS = (0.9, 0.95)
STEP = "training"
FILE_BYTES = 10**9


class Fit(Typed):
    """Where a training is, or how it ended."""

    kept: int = 0
    """The step of the best look."""
    steps: int = 0
    """Steps that were done, of all tries."""
    diverged: bool = False
    """Whether the last try did."""
    restarts: tuple[int, ...] = ()
    """The steps after which it began again."""
    looks: tuple[Look, ...]

    @property
    def begun(self) -> int:
        """The step after which the last try began."""
        return self.restarts[-1] if self.restarts else 0

    @property
    def share(self) -> float:
        """The rate of the last try as a share of that of the first."""
        return LOWER ** len(self.restarts)

    @property
    def best(self) -> float:
        """The held-out loss of what is kept."""
        return next(look.held_out_loss for look in self.looks if look.step == self.kept)


def share_of_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of step `step` (from 0) as a share of the largest: a linear warm-up, then half a cosine to zero."""
    warm = min(1.0, (step + 1) / (settings.warm_up + 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def order(settings: TrainingSettings, seed: int) -> list[list[int]]:
    """The numbers of the sequences of every step: all once, in random order, before any comes again."""
    generator, line = torch.Generator().manual_seed(seed), []
    while len(line) < settings.steps * settings.batch:
        line += torch.randperm(settings.sequences, generator=generator).tolist()
    return [line[step * settings.batch : (step + 1) * settings.batch] for step in range(settings.steps)]


def fit(
    parameters: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    settings: TrainingSettings,
    *,
    loss: Callable[[int], Tensor],
    dtype: str,
    device: str,
    seed: int,
    where: str,
    steps: Steps | None = None,
    once: Collection[TrainableLinear] = (),
) -> Fit:
    """Train `parameters` (float32) and leave the best values in them, rounded to their `dtypes`.

    `loss(index)` is the loss on one sequence, with a gradient; the sequences behind the first `settings.sequences` are
    held out. `dtype` is the model's, and held-out losses are computed as it runs on `device`. `where` begins the one
    warning of a rate that was too high. `steps` keeps what is done for the next run. The linears of `once` are
    multiplied out once a step: less time, more memory. Raises ArmorError if there are no parameters, the held-out loss
    is not finite at the start, or the disk has no room for `steps`.
    """
    if not parameters:
        raise ArmorError(f"{where}: without core it has nothing to train: no blocks, norms or biases; set core: true")

    def learn(batch: list[int]) -> float:
        """The mean loss of the sequences of these numbers, its gradient added to that of the parameters."""
        total = 0.0
        with ExitStack() as stack:
            with training_arithmetic(device):
                stack.enter_context(multiplied_once(once))
            for index in batch:
                with training_arithmetic(device):
                    share = loss(index) / len(batch)
                share.backward()
                total += share.item()
        return total

    def held_out_loss() -> float:
        rows = range(settings.sequences, settings.sequences + settings.held_out)
        with stored_arithmetic(dtype, device), multiplied_once(once):
            return sum(loss(index).item() for index in rows) / len(rows)

    state = _State(parameters, dtypes, settings, held_out_loss)
    state.start(steps)
    if not math.isfinite(start := state.fit.looks[0].held_out_loss):
        raise ArmorError(f"{where}: its held-out loss is {start} before the first step; what is damaged?")
    every = max(1, -(-settings.steps // LOOKS))

    def go_on() -> None:
        """To the end of a try."""
        begun, losses = state.fit.begun, []
        batches = list(enumerate(order(settings, seed), 1))[state.fit.steps - begun :]
        for step, batch in progress(batches, where, unit="step"):
            losses.append(learn(batch))
            if not math.isfinite(losses[-1]):
                state.diverge(begun + step)
                return
            state.step(share_of_rate(step - 1, settings))
            if step % every == 0 or step == settings.steps:
                state.look(begun + step, losses)
                losses = []
                state.save(steps)
                if state.ended():
                    return

    while not state.over():
        state.begin()
        go_on()
    state.leave_the_best()
    _say(state.fit, where, settings.rate)
    return state.fit


class _State:
    """What a training has come to: the values in `parameters`, the optimiser, the best look, and `fit`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
        settings: TrainingSettings,
        held_out_loss: Callable[[], float],
    ) -> None:
        self.parameters, self.dtypes, self.settings, self.held_out_loss = parameters, dtypes, settings, held_out_loss
        self.fit = Fit(looks=())
        self.best: dict[str, Tensor] = {}
        norms, sizes = settings.norm_rate, {name: _size(parameter) for name, parameter in parameters.items()}
        for name in (name for name, size in sizes.items() if size == 0 and name.endswith(".up")):
            sizes[name] = sizes[f"{name.removesuffix('up')}down"]
        self.rates = [
            settings.rate * sizes[name] * (norms if parameter.dim() == 1 else 1.0)
            for name, parameter in parameters.items()
        ]
        self.adam = torch.optim.Adam([{"params": [p]} for p in parameters.values()], betas=BETAS, fused=True)

    @property
    def bytes(self) -> int:
        """Of what is saved."""
        return sum(p.numel() * (12 + self.dtypes[name].itemsize) for name, p in self.parameters.items())

    def start(self, steps: Steps | None) -> None:
        """Go on where `steps` were saved, or look before the first. Raises ArmorError without room to save more."""
        went_on = steps is not None and self.load(steps)
        if steps is not None and not self.over():
            self.clear(steps)
            remedy = "set core: false" if self.settings.core else "take a larger disk"
            room_for(self.bytes * (1 if went_on else 2), steps.folder, "the steps of a training", remedy)
        if not went_on:
            self.look(0, [])

    def step(self, share: float) -> None:
        """One step of the optimiser, at that share of the try's rates."""
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * share * self.fit.share
        for parameter in self.parameters.values():
            if parameter.grad is None:  # that of an expert that no token comes to
                parameter.grad = torch.zeros_like(parameter)
        self.adam.step()
        self.adam.zero_grad()  # a look has the rounded values in their place

    def look(self, step: int, losses: list[float]) -> None:
        """The held-out loss after `step` steps, of what would be stored; kept if it is the best."""
        with torch.no_grad(), rounded(self.parameters, self.dtypes):
            found = self.held_out_loss()
        if step and not found <= DIVERGED * self.fit.looks[0].held_out_loss:
            self.diverge(step)
            return
        better = not step or found < self.fit.best
        if better:
            for name, parameter in self.parameters.items():
                if name not in self.best:
                    self.best[name] = torch.empty(parameter.shape, dtype=self.dtypes[name])
                self.best[name].copy_(parameter.detach())
        look = Look(step=step, train_loss=sum(losses) / len(losses) if losses else None, held_out_loss=found)
        kept = step if better else self.fit.kept
        self.fit = self.fit.replace(kept=kept, steps=step, looks=(*self.fit.looks, look))

    def diverge(self, step: int) -> None:
        self.fit = self.fit.replace(steps=step, diverged=True)

    def ended(self) -> bool:
        """Whether the try is at its end."""
        patience, begun = self.settings.patience or LOOKS + 1, self.fit.begun
        behind = sum(look.step > max(self.fit.kept, begun) for look in self.fit.looks)
        return self.fit.diverged or self.fit.steps - begun >= self.settings.steps or behind >= patience

    def over(self) -> bool:
        """Whether nothing is left to try: the last try did not diverge and found a better look, or it was the third."""
        found = self.fit
        won = not found.diverged and found.kept > found.begun
        return self.ended() and (won or len(found.restarts) == TRIES - 1)

    def begin(self) -> None:
        """Be where a try goes on; after its end another begins, at the best look, with a lower rate."""
        if self.ended():
            self.leave_the_best()
            self.adam.state.clear()
            self.fit = self.fit.replace(diverged=False, restarts=(*self.fit.restarts, self.fit.steps))

    @torch.no_grad()
    def leave_the_best(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
            parameter.grad = None

    def save(self, steps: Steps | None) -> None:
        """The values, Adam's moments and the best values; then the record; then what was saved before may go."""
        if steps is None or self.fit.diverged:  # the next run comes to the same, and begins again as this one does
            return
        folder = _state_folder(steps.folder, self.fit.steps)
        for file, names in self._files(folder):
            tensors: dict[str, Tensor] = {}
            for name in names:
                parameter, best = self.parameters[name], self.best[name]
                moments = self.adam.state[parameter]
                tensors |= {f"value {name}": parameter, f"best {name}": best}
                tensors |= {f"mean {name}": moments["exp_avg"], f"square {name}": moments["exp_avg_sq"]}
            save_safetensors(file, tensors)
        steps.put(STEP, self.fit)
        self.clear(steps)

    def clear(self, steps: Steps) -> None:
        """Delete what was saved but what the record names; a kill may have left more."""
        for old in steps.folder.glob("state_*"):
            if old != _state_folder(steps.folder, self.fit.steps):
                shutil.rmtree(old)

    def load(self, steps: Steps) -> bool:
        """What was saved, back in its places; whether there was something."""
        found = steps.get(STEP, Fit)
        if found is None or not (folder := _state_folder(steps.folder, found.steps)).is_dir():
            return False
        for file, names in self._files(folder):
            with open_safetensors(file) as opened:
                for name in names:
                    parameter = self.parameters[name]
                    parameter.data.copy_(opened.get_tensor(f"value {name}"))
                    self.adam.state[parameter] = {
                        "step": torch.tensor(float(found.steps - found.begun), device=parameter.device),
                        "exp_avg": opened.get_tensor(f"mean {name}").to(parameter.device),
                        "exp_avg_sq": opened.get_tensor(f"square {name}").to(parameter.device),
                    }
                    self.best[name] = opened.get_tensor(f"best {name}").clone()
        self.fit = found
        return True

    def _files(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        """The files in `folder` and the parameters in each: what one file holds is copied to the host at once."""
        ends = accumulate(16 * parameter.numel() for parameter in self.parameters.values())
        parts = groupby(zip(self.parameters, ends, strict=True), key=lambda part: part[1] // FILE_BYTES)
        for number, (_, part) in enumerate(parts):
            yield folder / f"{number}.safetensors", [name for name, _ in part]


def _say(done: Fit, where: str, rate: float) -> None:
    """The one line about a training that did not go well at its rate."""
    lowest = rate * done.share
    if done.diverged:
        kept = f"kept as of step {done.kept}" if done.kept else "kept as it was"
        log.warning(
            "%s: diverged at step %d, %s; lower the rate (%g, tried to %g)", where, done.steps, kept, rate, lowest
        )
    elif not done.kept:
        log.warning(
            "%s: none of %d steps lowered the held-out loss, at rates of %g to %g; kept as it was",
            where,
            done.steps,
            rate,
            lowest,
        )
    elif done.restarts:
        log.warning(
            "%s: a rate of %g was too high by step %d; trained at %g from the best step on",
            where,
            rate,
            done.restarts[0],
            lowest,
        )


def _state_folder(folder: Path, step: int) -> Path:
    return folder / f"state_{step}"


def _size(parameter: Tensor) -> float:
    """The root mean square."""
    return float(parameter.detach().double().square().mean().sqrt())
