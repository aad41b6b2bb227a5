"""The solver on every linear of SmolLM2-135M beside Adam, and what the loss is worth in perplexity.

Every linear is solved with each budget (block 64, pattern 2:4, importance from 32 × 1,024 calibration tokens), and by
Adam: the published step with betas .9/.92 and 3e-3, the best learning rate of 1e-3, 3e-3 and 1e-2 for 300 iterations
(the published 1e-4 is made for 20,000 and hardly moves in that time). It has no schedule, so its losses at 100 are read
off the trace of 300; a run of 150 gives its perplexity. Then each run's weights, A·S·B in float32, replace the model's,
and its perplexity is taken on 16 × 1,024 tokens of the other text.

    python -m benchmarks.solver_model                                         # packages as in benchmarks.solver; hours
    python -m benchmarks.solver_model --model FOLDER --calibrate FILE --evaluate FILE

One process a core with one thread each, one run of one decoder layer at a time; what is interrupted goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from armor.config.sources import TextSettings
from armor.core.factorization import Factorization
from armor.evaluate.logits import token_losses
from armor.evaluate.perplexity import perplexity
from armor.execution.files import read_json, save_safetensors, write_json
from armor.execution.machine import current_machine
from armor.format.records.topology import DecoderLayer, Topology
from armor.methods.solver import annealed, published
from armor.model.source import open_source
from armor.runtime.load import load_model
from armor.text.reading import read_blocks
from benchmarks.solver import BLOCK, TEXT, inputs, prepare

BUDGETS = (100, 300, 1000)
ADAM = (150, 300)
ADAM_LOSSES = (100, 150, 300)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def solvers() -> dict[str, Callable[..., Factorization]]:
    """The runs by name."""
    runs = {str(n): partial(annealed.solve, settings=annealed.Settings(iterations=n)) for n in BUDGETS}
    for n in ADAM:
        settings = published.Settings(iterations=n, learning_rate=3e-3, betas=(0.9, 0.92))
        runs[f"adam {n}"] = partial(published.solve, settings=settings)
    return runs


def solve_layer(run: str, layer: DecoderLayer, work: Path) -> None:
    """One run on every linear of a decoder layer -> work/RUN/layer_K.safetensors, the weights, and layer_K.json."""
    torch.set_num_threads(1)
    rows, weights = {}, {}
    for linear in layer.linears:
        name = linear.name.removeprefix("model.layers.")
        began = time.process_time()
        found = solvers()[run](*inputs(name, work), block_size=BLOCK)
        row = {"start": found.start_loss, run: found.loss, f"{run} seconds": time.process_time() - began}
        if run == f"adam {max(ADAM)}":
            row |= {f"adam {n}": best for n, _, best in found.trace if n in ADAM_LOSSES}
        rows[name] = row
        weights[f"{linear.name}.weight"] = found.reconstruct()
    save_safetensors(work / run / f"layer_{layer.index}.safetensors", weights)
    write_json(work / run / f"layer_{layer.index}.json", rows)


@torch.inference_mode()
def perplexities(work: Path, text: TextSettings) -> dict[str, dict]:
    """Perplexity and its standard error of the dense model and of every run."""
    folder = open_source(work / "source.json").path
    blocks = read_blocks(folder, text, 16, 1024).tokens
    model = load_model(folder, "float32")
    result = {}
    for run in ("dense", *solvers()):
        for file in sorted((work / run).glob("layer_*.safetensors")):
            model.load_state_dict(load_file(file), strict=False)
        losses = [token_losses(model(input_ids=block[None], use_cache=False).logits[0], block) for block in blocks]
        value, error = perplexity([each.mean().item() for each in losses])
        result[run] = {"perplexity": value, "standard_error": error}
        print(f"{run}: perplexity {value:.2f} ± {error:.2f}", flush=True)
    return result


def laws(table: dict[str, dict]) -> dict[str, list[str]]:
    """The linears that break each law: more iterations never end higher (1%), and Adam is never below."""
    pairs = [(str(many), str(few), 1.01) for few, many in zip(BUDGETS, BUDGETS[1:], strict=False)]
    pairs += [(str(n), f"adam {n}", 1.0) for n in BUDGETS if n in ADAM_LOSSES]
    return {f"{a} above {b}": [m for m, row in table.items() if row[a] > c * row[b]] for a, b, c in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of SmolLM2-135M")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="plain text of at least 32,768 tokens")
    parser.add_argument("--evaluate", type=Path, metavar="TEXT", help="other plain text of at least 16,384 tokens")
    parser.add_argument("--work", type=Path, default=Path("results/benchmark-solver"), help="where inputs are kept")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    prepare(options.model, options.calibrate, options.work)
    layers = Topology.read(options.work / "model.json").layers
    wanted = [(run, layer, options.work / run / f"layer_{layer.index}.json") for run in solvers() for layer in layers]
    left = [job for job in wanted if not job[2].exists()]
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(solve_layer, run, layer, options.work) for run, layer, _ in left]
        for done, job in enumerate(as_completed(jobs), 1 + len(wanted) - len(left)):
            job.result()
            print(f"{done} of {len(wanted)} layers", flush=True)
    table: dict[str, dict] = {}
    for _, _, output in wanted:
        for name, row in read_json(output).items():
            table[name] = table.get(name, {}) | row
    columns = ["start", *map(str, BUDGETS), *(f"adam {n}" for n in ADAM_LOSSES)]
    means = {
        group: {c: statistics.fmean(row[c] for name, row in table.items() if name.endswith(group)) for c in columns}
        for group in (*MODULES, "")
    }
    words = {"files": [str(options.evaluate)]} if options.evaluate else TEXT | {"documents": (64, None)}
    result = {
        "machine": current_machine().model_dump(),
        "block_size": BLOCK,
        "pattern": "2:4",
        "mean_loss": {group or "all": row for group, row in means.items()},
        "broken_laws": laws(table),
        "perplexity": perplexities(options.work, TextSettings(**words)),
        "linears": table,
    }
    write_json(options.output, result)
    for group, row in result["mean_loss"].items():
        print(f"{group:10}", *(f"{name} {loss:.5f}" for name, loss in row.items()))
    print(json.dumps(result["broken_laws"], indent=1))


if __name__ == "__main__":
    main()
