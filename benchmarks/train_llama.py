"""A small Llama of real training, whose weights never were quantized: what recipes of few bits are compared on.

    python -m benchmarks.train_llama runs/llama
    python -m benchmarks.train_llama runs/llama --text wiki.valid.raw --text wiki.test.raw

The models on the Python index lie on a 4-bit grid already. This one has 21 million parameters and a tokenizer of 4,096
entries of its own. It is trained on the articles of gensim's extract of Wikipedia but the last ones, which are for
evaluation, and on the files given. An hour of two cores is enough to learn more than the words' frequencies, and no
more. The rate warms up, stays, and falls over the last quarter of the steps. So a run that was killed goes on where it
was, also with another number of steps, as long as the fall has not begun. Same seed and same processor, same bytes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from armor.config.sources import TextSettings
from armor.execution.files import open_safetensors, save_safetensors, write_json
from armor.execution.log import progress
from armor.execution.machine import set_threads
from armor.text.blocks import blocks
from armor.text.sources import documents

WIKIPEDIA = {
    "package": "gensim==4.4.0",
    "file": "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
}
HELD_OUT = 100
"""The first article that is not trained on."""
STATE = "state/training.safetensors"  # in a folder of its own: whoever loads the model must not meet it
RATE, WARM_UP, FALL = 2e-3, 40, 0.25


def tokenizer_of(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, which therefore has tokens for every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def rate_at(step: int, steps: int) -> float:
    """The learning rate of `step`, from 0, of `steps`."""
    return RATE * min(1, (step + 1) / WARM_UP, (steps - step) / (FALL * steps))


def batch_at(step: int, tokens: Tensor, sequences: int, length: int) -> Tensor:
    """Windows (sequences, length) of the stream `tokens`, the same for a step whatever came before."""
    places = torch.randint(len(tokens) - length, (sequences,), generator=torch.Generator().manual_seed(step))
    return torch.stack([tokens[place : place + length] for place in places.tolist()])


def train(model: LlamaForCausalLM, tokens: Tensor, folder: Path, steps: int, sequences: int, every: int = 50) -> float:
    """Train on the stream `tokens` (n,), from the state in `folder` if there is one; the last losses' mean, in nats.

    There are `every` steps between two states on disk.
    """
    length = model.config.max_position_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    done, losses = _resume(model, optimizer, folder / STATE), []
    for step in progress(range(done, steps), "train", steps - done, "step", sequences * length, "tokens"):
        batch = batch_at(step, tokens, sequences, length)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0:
            _save(model, optimizer, folder / STATE, step + 1)
    _save(model, optimizer, folder / STATE, max(done, steps))
    last = losses[-every:]
    return sum(last) / len(last) if last else math.nan


def _save(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, file: Path, step: int) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {name: parameter, f"mean.{name}": moments["exp_avg"], f"square.{name}": moments["exp_avg_sq"]}
    save_safetensors(file, tensors, {"step": str(step)})


def _resume(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, file: Path) -> int:
    """Take up what `_save` left in `file`; the steps done. Raises ArmorError for a broken file."""
    if not file.is_file():
        return 0
    with open_safetensors(file) as state:
        step = int(state.metadata()["step"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state.get_tensor(name))
            moments = {"exp_avg": state.get_tensor(f"mean.{name}"), "exp_avg_sq": state.get_tensor(f"square.{name}")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """On blocks (count, length), float32."""
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in tokens]
    return float(torch.stack(losses).mean().exp())


def texts_of(files: list[Path]) -> Iterator[str]:
    yield from documents(TextSettings.model_validate(WIKIPEDIA | {"documents": (0, HELD_OUT)}))
    if files:
        yield from documents(TextSettings(files=[str(file) for file in files]))


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model goes, as a Hugging Face folder.")],
    text: Annotated[list[Path], typer.Option("--text", help="A file to train on too; more than once if need be.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option("--steps")] = 1500,
    sequences: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, and the model's context length.")] = 512,
    hidden: int = 512,
    inner: int = 1408,
    layers: int = 6,
    vocabulary: int = 4096,
    threads: Annotated[int | None, typer.Option("--threads")] = None,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if threads is not None:
        set_threads(threads)
    texts = list(texts_of(text))
    tokenizer = tokenizer_of(texts, vocabulary)
    tokens = torch.cat([torch.tensor([*tokenizer(each).input_ids, 0], dtype=torch.int64) for each in texts])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            vocab_size=vocabulary,
            max_position_embeddings=length,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    loss = train(model, tokens, folder, steps, sequences)
    held_out = documents(TextSettings.model_validate(WIKIPEDIA | {"documents": (HELD_OUT, None)}))
    found = {
        "parameters": model.num_parameters(),
        "tokens": len(tokens),
        "steps": steps,
        "trained_tokens": steps * sequences * length,
        "training_loss": loss,
        "perplexity": perplexity(model.eval(), blocks(held_out, tokenizer, 16, length, "held-out articles")),
    }
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "training.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
