"""Every class of transformers that writes text, as a tiny random model, through the whole pipeline: docs/FAMILIES.md.

    make families                                  # all of them; goes on where it was stopped
    python -m benchmarks.families mixtral gpt_oss  # these, again

These are the classes of AutoModelForCausalLM, and those of AutoModelForImageTextToText that are not the same. A
family's configuration is made small by `SMALL`, and by `OWN` where it needs more. Its model is inspected, calibrated,
factorized with blocks of 16, and assembled. The packed checkpoint is then loaded, and so is the dense one that `armor
export` makes of the same factors. Their logits in float32 are compared, and the dense one's with those that it has one
decoder layer at a time, as calibration runs it. Each family has a process of its own and a limit of time. What it came
to is a line of JSON in FOLDER/families.jsonl.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from armor.assemble.export import export
from armor.assemble.writer import assemble
from armor.calibrate.capture import calibrate
from armor.config.recipes import LayerSettings
from armor.config.sources import CalibrationSettings
from armor.core.errors import ArmorError
from armor.factorize.layer import factorize_layer
from armor.methods.solver.settings import SolverSettings
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.runtime.load import load_model
from armor.runtime.streaming import stream_model
from tests.tiny import VOCABULARY, tiny_text, tiny_tokenizer

__all__ = ["FAMILIES", "IMAGES", "attempt", "page", "small_config"]

FAMILIES = {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
IMAGES = "+images"
"""Behind the name of a family whose class for images and text is not that for text."""
FAMILIES |= {
    f"{family}{IMAGES}": kind
    for family, kind in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    if FAMILIES.get(family) != kind
}
PAGE = Path("docs/FAMILIES.md")
LINES = "families.jsonl"
SECONDS = 120
"""The limit of a family's process, of the processor's time: a busy machine makes no family fail."""
ASLEEP = 3600
"""Seconds after which a process that does not even compute is ended."""
LARGEST = 30_000_000
"""Parameters of a model that is still tiny; more means that some size has a name that SMALL lacks."""
TOKENS = 40
"""In the sequence that packed and dense logits are compared on."""
CLOSE = 1e-5
"""How far packed and dense logits may be apart, relative, in float32."""

# fmt: off
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "shared_intermediate_size",
                     "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
                     "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "moe_k", "moe_topk",
                     "n_group", "attn_layer_period", "expert_layer_period", "expand", "mamba_expand"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "conv_kernel",
                     "linear_num_value_heads"), 4),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace", "attn_layer_offset",
                     "expert_layer_offset", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                     "v_head_dim", "sliding_window", "attention_window", "window_size", "mamba_d_head",
                     "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                     "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("state_size", "time_step_rank", "mamba_d_state", "mamba_dt_rank", "mamba_n_heads", "num_heads",
                     "mamba_num_heads", "ssm_state_size", "laurel_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "moe_intermediate_size": 32, "q_lora_rank": 32, "shared_expert_intermediate_size": 64,
    "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "use_mamba_kernels": False,
    "partial_rotary_factor": 0.5,
}
LLAMA4 = {"num_hidden_layers": 2, "moe_layers": [0, 1], "no_rope_layers": [1, 0],
          "layer_types": ["chunked_attention", "full_attention"]}  # every layer is a mixture, and listed
TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}  # in time, height and width
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "num_kv_shared_layers": 2}  # the last two have keys and values of the first two
QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
         "indexer_compress_ratio": 4}
INKLING2 = {"unpadded_vocab_size": VOCABULARY, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
            "swa_head_dim": 16, "sliding_window_size": 16, "d_rel": 8, "rel_extent": 16}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm_ocr", "glmga",
                     "paddleocr_vl"), {"text_config": {"rope_parameters": TURNS}}),
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters":
                            dict.fromkeys(("sliding_attention", "full_attention"), {"rope_theta": 10000.0})},
    "cosmos3_edge": {"text_config": {"rope_parameters": TURNS}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 32, "index_head_dim": 16,
                        "index_n_heads": 2, "index_topk": 8, "shared_experts_intermediate_size": 32},
    "exaone4_5": {"text_config": {"model_type": "exaone4"}},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": SHARED | {"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED,
    "git": {"vision_config": {"num_hidden_layers": 3}},  # layers of the text are found by their number
    "glm4v_moe": {"text_config": {"rope_parameters": TURNS | {"mrope_section": [1, 1, 2]}}},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "hy_v4_vl": {"text_config": {"rope_parameters": TURNS}},
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), INKLING2),
    "llama4_text": LLAMA4,
    "llama4": {"text_config": LLAMA4,
               "vision_config": {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 0},  # a checkpoint has no tensors of experts that do nothing
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_vl": {"text_config": {"rope_parameters": TURNS}, "vision_config": {"embed_dim": 64}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "attention_head_size": 16,
                 "feed_forward_size": 128, "attn_layers": ["local", "local"], "local_attn_chunk_length": 16},
    "xlnet": {"d_head": 16, "d_inner": 128},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "num_heads": 4},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "layers_block_type": None},
    "zamba2": {"num_hidden_layers": 6, "num_mem_blocks": 1, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside; a value of None takes a key out."""
# fmt: on


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """Small values for the keys that `config` has, and lists by layer as short, each of their values once in them."""
    found = {
        key: value
        for key, value in SMALL.items()
        if getattr(type(config), key, None).__class__ is not property and _has(config, key)
    }
    layers = getattr(config, "num_hidden_layers", None)
    by_layer = {
        key: list(dict.fromkeys(value))
        for key, value in config.to_dict().items()
        if isinstance(value, list) and value and len(value) == layers and not isinstance(value[0], list | dict)
    }
    if "kv_lora_rank" in found:  # latent attention has no groups of heads
        found["num_key_value_heads"] = SMALL["num_attention_heads"]
    few = max([2, *map(len, by_layer.values())])
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        found |= {key: few} if key in found else {}
    return found | {key: (kinds * few)[:few] for key, kinds in by_layer.items()}


def _has(config: PreTrainedConfig, key: str) -> bool:
    """Whether `config` has a value of its own for `key`; one that differs by layer is not asked for as a whole."""
    try:
        return getattr(config, key, None) is not None or key in config.to_dict()
    except AttributeError:
        return False


def small_config(family: str) -> PreTrainedConfig:
    """A configuration of `family` for a model of some hundred thousand parameters."""
    full = AutoConfig.for_model(family)
    parts = {name: getattr(full, name, None) for name in full.sub_configs}
    for config in (full, *parts.values()):
        if config is not None:  # values that differ by layer may be asked for as a whole: all are made the same
            config.allow_global_per_layer_attribute_access = True
    small = {name: _small(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    own = OWN.get(family, {})
    small = {name: part | own.get(name, {}) for name, part in small.items()}
    given = _small(full) | own | small
    return AutoConfig.for_model(family, **{key: value for key, value in given.items() if value is not None})


def _model(family: str, folder: Path) -> None:
    """Save a tiny random model of `family` to `folder`; ValueError, or an error of its own, if it does not run."""
    auto = AutoModelForImageTextToText if family.endswith(IMAGES) else AutoModelForCausalLM
    config = small_config(family.removesuffix(IMAGES))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are left in its small configuration")
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    if not _logits(model).isfinite().all():
        raise ValueError("its logits are not finite")
    model.save_pretrained(folder)
    tiny_tokenizer(folder)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of text alone: of TOKENS tokens."""
    return model(input_ids=torch.arange(TOKENS)[None], return_dict=False)[0]


def _apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference of two models' logits."""
    return ((logits - expected).norm() / expected.norm()).item()


def attempt(family: str, root: Path) -> dict[str, Any]:
    """What came of `family`: its class, outcome, share compressed, packed against dense, and a note; works in `root`.

    The outcome is "ok", "refused" (with the line), "differs", "fails" (with the error), or "no model" where no tiny one
    was made that runs as it is.
    """
    found: dict[str, Any] = {"family": family, "class": FAMILIES[family]}
    stage = "model"
    try:
        _model(family, root / "source")
        stage, source = "inspect", open_source(root / "source")
        topology = inspect(source, root / "model.json")
        found["compressed_share"] = topology.compressed_share()
        stage, text = "calibrate", root / "text.txt"
        text.write_text(tiny_text(120), encoding="utf-8")
        settings = CalibrationSettings(text={"files": [str(text)]}, sequences=2, sequence_length=48)
        calibrate(source, topology, settings, root / "calibration" / "calibration.json")
        stage, settings = "factorize", LayerSettings(method="armor", block_size=16, solver=SolverSettings(iterations=1))
        for layer in topology.layers:
            file = f"layer_{layer.index}.safetensors"
            factorize_layer(
                source, topology, layer.index, root / "calibration" / file, settings, root / "layers" / file
            )
        stage = "assemble"
        assemble(source, topology, root / "layers", root / "checkpoint.json")
        stage, packed = "load", load_model(root / "checkpoint", "float32")
        export(root / "checkpoint", root / "dense")
        dense = _logits(load_model(root / "dense", "float32"))
        found["packed_against_dense"] = _apart(_logits(packed), dense)
        stage, (streamed,) = "stream", stream_model(root / "dense", "float32").logits([torch.arange(TOKENS)[None]])
        found["streamed_against_loaded"] = _apart(streamed, dense)
        close = max(found["packed_against_dense"], found["streamed_against_loaded"]) <= CLOSE
        found["outcome"] = "ok" if close else "differs"
    except ArmorError as error:
        found |= {"outcome": "refused", "note": f"{stage}: {_line(error, root)}"}
    except Exception as error:  # whatever a family's own code raises is what is to be seen
        place = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{type(error).__name__}: {_line(error, root)} ({Path(place.filename).name}:{place.lineno})"
        found |= {"outcome": "no model" if stage == "model" else "fails", "note": f"{stage}: {note}"}
    return found


def _line(error: Exception, root: Path) -> str:
    return " ".join(str(error).replace(f"{root}/", "").split())


def _child(family: str, root: Path) -> None:
    """`attempt` in a process of its own, its noise in `root`/log.txt and what it found in `root`/found.json."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    with (root / "log.txt").open("w", encoding="utf-8") as noise:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        (root / "found.json").write_text(json.dumps(attempt(family, root)), encoding="utf-8")


def _tried(family: str, root: Path) -> dict[str, Any]:
    """What came of `family` in a process that is ended after SECONDS of computing."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(family, root))
    process.start()
    process.join(ASLEEP)
    if process.is_alive():
        process.kill()
        process.join()
    seconds = round(time.monotonic() - start, 1)
    file = root / "found.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    else:
        ended = process.exitcode == -signal.SIGXCPU
        note = f"no end in {SECONDS} s of computing" if ended else f"its process ended with {process.exitcode}"
        found = {"family": family, "class": FAMILIES[family], "outcome": "fails", "note": note}
    shutil.rmtree(root)
    return found | {"seconds": seconds}


TEXT = """# Families

Every class of transformers {version} that AutoModelForCausalLM maps, and those of AutoModelForImageTextToText that are
not the same (`{images}`), as a tiny random model of float32, through `inspect`, `calibrate`, `factorize` (ARMOR, blocks
of 16), `assemble`, and loading. Written by `make families` (`benchmarks/families.py`).

"Share compressed" is the share of the decoder layers' weights that is compressed. Tiny models have large norms and
convolutions for their size, so the share of a real model is higher. "Packed against dense" is the relative difference
between the logits of the packed model and those of the dense model with the same factors. The limit for "ok" is
{close:g}. The dense model's logits must stay within it too when its decoder layers are run one at a time, as in
calibration. "No model" means that the script could not make a tiny model that runs. This says nothing about the family.

{counts}.

Refused are models whose layers cannot be run one by one: Dory and HRM run theirs several times, Reformer's are
reversible and pass two streams, XLM has lists of attentions and of MLPs instead of layers. ShieldGemma 2 is refused for
transformers itself does not load it as it saved it. Inklings, but for the first one's text model, store their experts
in a form that is not read.

DBRX and JetMoe stack their experts in forms that are not read either. They stay dense, as `armor inspect` says, and the
small rest is compressed. Layers of Zamba share a block of attention and MLP. Each would compress it for inputs of its
own, so it stays dense.

| family | share compressed | packed against dense | notes |
|---|--:|--:|---|
{rows}
"""


def page(lines: dict[str, dict[str, Any]]) -> str:
    """docs/FAMILIES.md from the `lines` by family; says how many families were not tried."""
    outcomes = [found["outcome"] for found in lines.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in ("ok", "refused", "differs", "fails", "no model")}
    counts["not tried"] = len(set(FAMILIES) - lines.keys())
    return TEXT.format(
        version=transformers.__version__,
        images=IMAGES,
        close=CLOSE,
        counts=", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count),
        rows="\n".join(_row(lines[family]) for family in sorted(lines)),
    )


def _row(found: dict[str, Any]) -> str:
    share, apart = found.get("compressed_share"), found.get("packed_against_dense")
    note = found.get("note", "").replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")[:300]
    notes = found["outcome"] + (f": {note}" if note else "")
    cells = (f"{share:.1%}" if share is not None else "–", f"{apart:.1e}" if apart is not None else "–", notes)
    return f"| {found['family']} | " + " | ".join(cells) + " |"


def main(
    families: Annotated[list[str] | None, typer.Argument(help="Try these, again if need be. All by default.")] = None,
    folder: Annotated[Path, typer.Option(help="Where families.jsonl is, and models for a moment.")] = Path(
        "build/families"
    ),
) -> None:
    """Try the families that have no line yet, or those that are named. Once all have one, write docs/FAMILIES.md."""
    torch.set_num_threads(1)  # processes are forked: no other thread may run
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("armor").setLevel("ERROR")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LINES
    said = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = {found["family"]: found for found in map(json.loads, said)}
    for family in families or [family for family in FAMILIES if family not in lines]:
        lines[family] = _tried(family, folder / family)
        print(*(f"{key}={value}" for key, value in lines[family].items()), flush=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(lines[family]) + "\n")
    if lines.keys() >= {*FAMILIES}:  # else the page would lose the others
        PAGE.write_text(page(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
