"""The loop that refine and tune share: Adam, a look at held-out sequences now and then, the best look kept.

Every tensor has a rate of its own, relative to the root mean square that it starts with: one number serves all families
and both sides of A·S·B. What is kept is what the best look saw, rounded to the dtype that it is stored in, and the
first look is before the first step. So the held-out loss of what is stored is never above that of the start.

At every look all that the loop needs goes to disk, so that a run that was killed goes on there and ends with the same
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from armor.config.training import TrainingSettings
from armor.errors import ArmorError
from armor.execution.files import open_safetensors, save_safetensors
from armor.execution.log import log, progress
from armor.execution.resume import Steps
from armor.format.records.layer import Look
from armor.training.trainable import rounded
from armor.typed import Typed

__all__ = ["Fit", "fit", "share_of_rate"]

LOOKS = 8
DIVERGED = 2.0  # times the held-out loss at the start
BETAS = (0.9, 0.95)
STEP = "training"


class Fit(Typed):
    """Where a training is, or how it ended."""

    kept: int = 0
    """The step of the best look."""
    steps: int = 0
    """Steps that were done."""
    diverged: bool = False
    looks: tuple[Look, ...]

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
    learn: Callable[[list[int]], float],
    held_out_loss: Callable[[], float],
    seed: int,
    where: str,
    steps: Steps | None = None,
) -> Fit:
    """Train `parameters` (float32) and leave the best values in them, rounded to their `dtypes`.

    `learn(batch)` adds the gradient of the mean loss on the training sequences of these numbers to that of the
    parameters and returns that loss; `held_out_loss()` is that on the held-out sequences. `where` begins the one
    warning of a training that diverges or does not help. `steps` keeps what is done for the next run. Raises
    ArmorError if the held-out loss is not finite at the start.
    """
    rates = [settings.rate * _size(p) * (settings.norm_rate if p.dim() == 1 else 1.0) for p in parameters.values()]
    adam = torch.optim.Adam([{"params": [p], "lr": 0.0} for p in parameters.values()], betas=BETAS, fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)  # an expert that no token comes to has none
    now = None if steps is None else steps.get(STEP, Fit)
    if now is not None and steps is not None and _state_file(steps.folder, now.steps).is_file():
        best = _load(_state_file(steps.folder, now.steps), parameters, adam, now.steps)
    else:
        start = _look(parameters, dtypes, held_out_loss)
        if not math.isfinite(start):
            raise ArmorError(f"{where}: its held-out loss is {start} before the first step; what is damaged?")
        now = Fit(looks=(Look(step=0, train_loss=None, held_out_loss=start),))
        best = {name: p.detach().to(dtypes[name], copy=True) for name, p in parameters.items()}
    every = max(1, -(-settings.steps // LOOKS))
    losses: list[float] = []
    batches = list(enumerate(order(settings, seed)))[now.steps :]
    for step, batch in progress(batches, where, unit="step") if not _ended(now, settings) else ():
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * share_of_rate(step, settings)
        losses.append(learn(batch))
        if not math.isfinite(losses[-1]):
            now = now.model_copy(update={"steps": step + 1, "diverged": True})
            break
        adam.step()
        adam.zero_grad(set_to_none=False)
        if (step + 1) % every and step + 1 < settings.steps:
            continue
        found = _look(parameters, dtypes, held_out_loss)
        if not found <= DIVERGED * now.looks[0].held_out_loss:
            now = now.model_copy(update={"steps": step + 1, "diverged": True})
            break
        look = Look(step=step + 1, train_loss=sum(losses) / len(losses), held_out_loss=found)
        losses.clear()
        if found < now.best:
            now = now.model_copy(update={"kept": step + 1})
            best = {name: p.detach().to(dtypes[name], copy=True) for name, p in parameters.items()}
        now = now.model_copy(update={"steps": step + 1, "looks": (*now.looks, look)})
        if steps is not None:
            _save(steps, now, parameters, adam, best)
        if _ended(now, settings):
            break
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
            parameter.grad = None
    if now.diverged:
        kept = f"kept as of step {now.kept}" if now.kept else "kept as it was"
        log.warning("%s: diverged at step %d, %s; lower the rate (%g)", where, now.steps, kept, settings.rate)
    elif not now.kept:
        log.warning("%s: none of %d steps lowered the held-out loss; kept as it was", where, now.steps)
    return now


def _size(parameter: Tensor) -> float:
    """The root mean square."""
    return float(parameter.detach().double().square().mean().sqrt())


def _look(
    parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype], held_out_loss: Callable[[], float]
) -> float:
    with torch.no_grad(), rounded(parameters, dtypes):
        return held_out_loss()


def _ended(now: Fit, settings: TrainingSettings) -> bool:
    behind = sum(look.step > now.kept for look in now.looks)
    return now.steps >= settings.steps or (settings.patience is not None and behind >= settings.patience)


def _state_file(folder: Path, step: int) -> Path:
    return folder / f"state_{step}.safetensors"


def _save(
    steps: Steps,
    now: Fit,
    parameters: Mapping[str, nn.Parameter],
    adam: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """The values, Adam's moments and the best values; then the record; then the state before may go."""
    tensors = {f"best {name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        moments = adam.state[parameter]
        tensors |= {f"value {name}": parameter, f"mean {name}": moments["exp_avg"]}
        tensors[f"square {name}"] = moments["exp_avg_sq"]
    file = _state_file(steps.folder, now.steps)
    save_safetensors(file, tensors)
    steps.put(STEP, now)
    for old in steps.folder.glob("state_*.safetensors"):
        if old != file:
            old.unlink()


def _load(
    file: Path, parameters: Mapping[str, nn.Parameter], adam: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """What `_save` saved, back in its places; returns the best values."""
    best = {}
    with open_safetensors(file) as opened:
        for name, parameter in parameters.items():
            parameter.data.copy_(opened.get_tensor(f"value {name}"))
            adam.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": opened.get_tensor(f"mean {name}").to(parameter.device),
                "exp_avg_sq": opened.get_tensor(f"square {name}").to(parameter.device),
            }
            best[name] = opened.get_tensor(f"best {name}").to(parameter.device)
    return best
