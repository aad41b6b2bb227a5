"""What each step from floats to integers brings in perplexity: all linears of a model that was refined or tuned.

    M=runs/quantized/results/smollm2-135m
    python -m benchmarks.quantize_model $M/armor-tuned/tuned $M/armor-tuned/checkpoint $M/calibration/wikitext2 \
        $M/source.json --evaluate wiki.test.raw

The steps come one on top of the other: every number to the nearest, on the scale that holds the largest of its group;
searched scales; S by coordinate descent toward the floats, with A and B at the nearest; the first round of the search,
in which A and B are refitted too; its fourth. "Not balanced" is the first round from other factors of the same product,
as in benchmarks.quantize. A and B are int8; S is int8 and fp8, 128 numbers to a scale, and int4, 32. Perplexity and the
KL divergence from the dense model in float32, on 16 × 1,024 tokens. One process a core with one thread each. The
weights of all steps lie in --work, 18 × 4 bytes a weight; what is interrupted goes on where it was.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.quantization import NumberType, Quantization
from armor.evaluate.logits import comparison, token_losses
from armor.evaluate.perplexity import perplexity
from armor.execution.files import save_safetensors, write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine
from armor.format.factors import read_factors
from armor.format.names import layer_file, layer_files
from armor.format.shards import Shards
from armor.format.statistics import read_statistics
from armor.methods.solver.integers import rounded_core, searched
from armor.methods.solver.objective import Objective
from armor.methods.solver.output import between, damped
from armor.methods.solver.rounding import column_weights, to_nearest
from armor.model.source import open_source
from armor.runtime.load import load_model
from armor.text.reading import read_blocks
from benchmarks.quantize import rounded_plainly, unbalanced

NUMBERS: dict[NumberType, int] = {"int8": 128, "int4": 32, "fp8": 128}
STEPS = ("nearest", "+ scales", "+ feedback", "+ refit", "4 rounds", "not balanced, + refit")


def products(weight: Tensor, importance: Tensor, h: Tensor, given: Factorization, core: NumberType) -> list[Tensor]:
    """A·S·B (out, in) of `given` with S as `core`, after each of STEPS, brought close to what it is in floats."""
    assert given.right is not None
    kind = Quantization(core, "int8", given.pattern.columns_of(NUMBERS[core]))
    d, ones = column_weights(Objective.of(weight, importance)), torch.ones(len(weight))
    target, other = given.reconstruct(), unbalanced(given)
    scaled = to_nearest(given, kind, d)
    descended, _ = rounded_core(given.core, between(given.right, h), given.core, given, scaled)
    first, *_, last = searched(target, ones, h, given, scaled)
    first_of_other = next(searched(target, ones, h, other, to_nearest(other, kind, d)))
    steps = [rounded_plainly(given, kind), scaled, descended, first, last, first_of_other]
    return [each.reconstruct() for each in steps]


@torch.no_grad()
def quantize_layer(number: int, core: NumberType, factors: Path, calibration: Path, source: Path, work: Path) -> None:
    """All linears of decoder layer `number` -> work/CORE STEP/layer_K.safetensors, the weights of each step."""
    torch.set_num_threads(1)
    dense, inputs = Shards(source), read_statistics(layer_file(calibration, number), gram=True)
    found: dict[str, dict[str, Tensor]] = {step: {} for step in STEPS}
    for name, stored in read_factors(layer_file(factors, number))[0].items():
        assert stored.left is not None and stored.right is not None
        given = replace(stored, core=stored.core.float(), left=stored.left.float(), right=stored.right.float())
        if (gram := inputs[name].gram) is None:
            raise ArmorError(f"{layer_file(calibration, number)}: no Gram matrices; calibrate with `gram: true`")
        weight, importance = dense.read(f"{name}.weight").float(), inputs[name].importance
        made = products(weight, importance, damped(gram).float(), given, core)
        for step, product in zip(STEPS, made, strict=True):
            found[step][f"{name}.weight"] = product
    for step in STEPS:
        save_safetensors(layer_file(work / f"{core} {step}", number), found[step])


def scores(model: torch.nn.Module, tokens: Tensor, wanted: list[Tensor]) -> dict[str, float]:
    """Perplexity on tokens (blocks, length), and KL divergence in nats from the logits `wanted` of each block."""
    means, divergences = [], []
    for block, other in zip(tokens, wanted, strict=True):
        own = model(input_ids=block[None], use_cache=False).logits[0]
        means.append(token_losses(own, block).mean().item())
        divergences.append(comparison(own, other)[0].mean().item())
    return {"perplexity": perplexity(means)[0], "kl": sum(divergences) / len(divergences)}


@torch.inference_mode()
def judged(checkpoint: Path, source: Path, text: Path, work: Path) -> dict[str, dict[str, float]]:
    """Perplexity and KL divergence in nats of the checkpoint, in floats, and of it after each step."""
    tokens = read_blocks(source, TextSettings(files=[str(text)]), 16, 1024).tokens
    dense, model = load_model(source, "float32"), load_model(checkpoint, "float32").dequantize()
    wanted = [dense(input_ids=block[None], use_cache=False).logits[0] for block in tokens]
    result = {}
    for run in ("floats", *(f"{core} {step}" for core in NUMBERS for step in STEPS)):
        for file in layer_files(work / run):
            unknown = model.load_state_dict(load_file(file), strict=False).unexpected_keys
            assert not unknown, unknown
        found = scores(model, tokens, wanted)
        result[run] = {"perplexity": round(found["perplexity"], 3), "kl": round(found["kl"], 4)}
        print(f"| {run} | {found['perplexity']:.2f} | {found['kl']:.4f} |", flush=True)
    return result


def main(
    factors: Annotated[Path, typer.Argument(help="The folder of a recipe's factors, in floats.")],
    checkpoint: Annotated[Path, typer.Argument(help="Its checkpoint.")],
    calibration: Annotated[Path, typer.Argument(help="The folder of its statistics, with Gram matrices.")],
    model: Annotated[Path, typer.Argument(help="source.json of the dense model.")],
    evaluate: Annotated[Path, typer.Option("--evaluate", help="Plain text of at least 16,384 tokens.")],
    work: Annotated[Path, typer.Option("--work", help="Where each step's weights are kept.")] = Path("steps"),
    processes: Annotated[int, typer.Option("--processes")] = os.cpu_count() or 1,
) -> None:
    """Print a row for each type of the core and each step; write benchmarks/quantize_model.json."""
    source, layers = open_source(model).path, range(len(layer_files(factors)))
    if not layers:
        raise ArmorError(f"{factors}: no layer_*.safetensors; name the folder of a recipe's last stage")
    wanted: list[tuple[int, NumberType]] = [(number, core) for core in NUMBERS for number in layers]
    missing = [job for job in wanted if not layer_file(work / f"{job[1]} {STEPS[-1]}", job[0]).is_file()]
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(quantize_layer, *job, factors, calibration, source, work) for job in missing]
        for job in progress(as_completed(jobs), "quantize", len(jobs), "layer"):
            job.result()
    found = judged(checkpoint, source, evaluate, work)
    write_json(Path(__file__).with_suffix(".json"), {"machine": current_machine().model_dump(), "steps": found})


if __name__ == "__main__":
    typer.run(main)
