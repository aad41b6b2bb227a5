"""A pruned model recovered by LoRA the way its users do it: PEFT's adapters, transformers' Trainer.

    M=runs/competitors/results/smollm2-135m
    python -m benchmarks.lora $M/source.json $M/sparsegpt/checkpoint --train wiki.valid.raw --evaluate wiki.test.raw

The adapters stand beside all linears but the head, which stay as they are: as many bits as `method: lora` of this rank.
Their loss is that of the next token, or the KL divergence from the dense model's predictions, as tune has it, on the
sequences that tune has. The Trainer's AdamW and clipping, a twelfth of the steps to warm up, a cosine; of eight looks
at the held-out sequences the best is kept. There is one stage: give it the steps that take the time of refine and tune
together. On the CPU, products in bfloat16 where it multiplies in it; perplexity and KL divergence in float32 on 16 x
1,024 tokens.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from armor.config.sources import TextSettings
from armor.config.training import TuneSettings
from armor.execution.files import read_json, write_json
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.model.source import open_source
from armor.runtime.load import load_model
from armor.runtime.skeleton import compute_dtype
from armor.text.reading import read_blocks
from armor.training.tune import kept_predictions, kl_divergence
from benchmarks.quantize_model import scores

LENGTH, LOOKS = 1024, 8
SETTINGS = TuneSettings()
OUTPUT = Path(__file__).with_suffix(".json")


class Distilled(Trainer):
    """Learns from the dense model's predictions where a batch has them, else from the text."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "tokens" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"])
        kept = zip(outputs.logits, inputs["tokens"], inputs["log_probabilities"], strict=True)
        loss = torch.stack([kl_divergence(*one).mean() for one in kept]).mean()
        return (loss, outputs) if return_outputs else loss


@torch.inference_mode()
def examples(source: Path, tokens: Tensor, loss: Literal["text", "kl"]) -> list[dict[str, Tensor]]:
    """What the Trainer reads: each of the tokens (sequences, length) with what is to be learned of it."""
    found = [{"input_ids": row, "labels": row} for row in tokens]
    if loss == "kl":
        dense = load_model(source, "float32")
        kept = kept_predictions(dense(input_ids=row[None], use_cache=False).logits[0] for row in tokens)
        for one, *more in zip(found, kept.tokens, kept.log_probabilities, strict=True):
            one |= dict(zip(("tokens", "log_probabilities"), more, strict=True))
    return found


def main(
    model: Annotated[Path, typer.Argument(help="source.json of the dense model.")],
    checkpoint: Annotated[Path, typer.Argument(help="A pruned checkpoint of it.")],
    train: Annotated[Path, typer.Option("--train", help="Plain text of at least 204,800 tokens.")],
    evaluate: Annotated[Path, typer.Option("--evaluate", help="Plain text of at least 16,384 tokens.")],
    loss: Annotated[Literal["text", "kl"], typer.Option("--loss", help="What is made small.")] = "kl",
    rate: Annotated[float, typer.Option("--rate", help="The largest step of AdamW.")] = 1e-3,
    steps: Annotated[int, typer.Option("--steps")] = SETTINGS.steps,
    rank: Annotated[int, typer.Option("--rank")] = 64,
) -> None:
    """Train, print the model before and after; add both to benchmarks/lora.json."""
    source = open_source(model).path
    sequences, every = SETTINGS.sequences + SETTINGS.held_out, -(-steps // LOOKS)
    tokens = read_blocks(source, TextSettings(files=[str(evaluate)]), 16, LENGTH).tokens
    begun = time.perf_counter()
    data = examples(source, read_blocks(source, TextSettings(files=[str(train)]), sequences, LENGTH).tokens, loss)
    pruned = load_model(checkpoint, "float32").dequantize()
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(pruned, lora)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=SETTINGS.batch,
            per_device_eval_batch_size=1,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 12,
            bf16=compute_dtype("bfloat16") == torch.bfloat16,
            use_cpu=True,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=every,
            save_steps=every,
            load_best_model_at_end=True,
            save_total_limit=1,
            logging_steps=every,
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            report_to="none",
            seed=0,
        )
        trainer = Distilled(
            adapted, arguments, train_dataset=data[: SETTINGS.sequences], eval_dataset=data[SETTINGS.sequences :]
        )
        trainer.train()
    seconds, peak = time.perf_counter() - begun, peak_memory_bytes("cpu")
    with torch.inference_mode():
        dense = load_model(source, "float32")
        wanted = [dense(input_ids=block[None], use_cache=False).logits[0] for block in tokens]
        adapted = trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False).eval()  # bfloat16 was for training
        with adapted.disable_adapter():
            before = scores(adapted, tokens, wanted)
        after = scores(adapted, tokens, wanted)
    found = {
        "machine": current_machine().model_dump(),
        "trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "before": before,
        "after": after,
        "held_out": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "best_step": trainer.state.best_global_step,
        "seconds": round(seconds),
        "peak_memory_bytes": peak,
    }
    row = f"{checkpoint.parent.name}, rank {rank}, {loss}, {steps} steps at {rate:g}"
    print(
        f"{row}: perplexity {before['perplexity']:.2f} to {after['perplexity']:.2f}, "
        f"KL {before['kl']:.3f} to {after['kl']:.3f}, {seconds:.0f} s, {peak / 1e9:.2f} GB"
    )
    write_json(OUTPUT, (read_json(OUTPUT) if OUTPUT.is_file() else {}) | {row: found})  # not of one that diverged


if __name__ == "__main__":
    typer.run(main)
