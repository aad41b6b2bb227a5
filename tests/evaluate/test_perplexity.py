"""Perplexity: the definition, computed plainly; its standard error; and what is refused."""

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.evaluate.logits import comparison, peak_bytes, token_losses
from armor.evaluate.perplexity import evaluate, mean, perplexity
from armor.execution.files import part_of
from armor.format.records.evaluation import EvaluationRecord
from armor.runtime.load import load_model
from tests.killed import SAVED, forked
from tests.memory import NoRoom, host_of
from tests.packed import edit_tensors, packed
from tests.tiny import tiny_model, tiny_text


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(60))
    return path


def settings(text, **changes) -> EvaluationSettings:
    return EvaluationSettings(**{"text": {"files": [str(text)]}, "sequences": 5, "sequence_length": 48} | changes)


@pytest.mark.parametrize("tokens, vocabulary", [(2, 7), (300, 50)])
def test_losses_and_divergences_equal_the_unchunked_definition(tokens, vocabulary):
    logits, dense = torch.randn(2, tokens, vocabulary)
    targets, own = torch.randint(vocabulary, (tokens,)), logits.double().log_softmax(-1)[:-1]
    rounded = logits.bfloat16()  # summed in float32 all the same
    assert torch.equal(token_losses(rounded, targets), token_losses(rounded.float(), targets))
    losses = token_losses(logits, targets)
    torch.testing.assert_close(losses, -own[range(tokens - 1), targets[1:]].float(), atol=1e-5, rtol=1e-5)
    divergences, same = comparison(logits, dense)
    p = dense.double().softmax(-1)[:-1]
    torch.testing.assert_close(divergences, (p * (p.log() - own)).sum(-1).float(), atol=1e-5, rtol=1e-5)
    assert same.tolist() == [int(a.argmax()) == int(b.argmax()) for a, b in zip(logits[:-1], dense[:-1], strict=True)]


def test_perplexity_is_that_of_the_whole_model(tmp_path, text):
    folder = tiny_model(tmp_path / "model", "gemma3_text")
    result = evaluate(folder, settings(text), tmp_path / "evaluation" / "wiki.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids[0]
    blocks = ids[: 5 * 48].view(5, 48)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(blocks).logits[:, :-1].double().flatten(0, 1), blocks[:, 1:].flatten()
        )
    assert result.value == pytest.approx(math.exp(losses.item()), rel=1e-5)
    assert (result.evaluation, result.tokens, result.blocks, result.length) == ("wiki", 5 * 47, 5, 48)
    assert EvaluationRecord.read(tmp_path / "evaluation" / "wiki.json") == result


def test_standard_error_is_that_of_many_repetitions():
    means = 3 + 0.1 * torch.randn(2000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, errors = zip(*(perplexity(row) for row in means.tolist()), strict=True)
    assert torch.tensor(values).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.05)


def test_of_one_block_there_is_no_standard_error():
    assert perplexity([2.0]) == (math.exp(2), None)


def test_the_dtype_asked_for_is_computed_in(tmp_path, text):
    folder = tiny_model(tmp_path / "model")
    exact = evaluate(folder, settings(text), tmp_path / "wiki.json").value
    rounded = evaluate(folder, settings(text, dtype="bfloat16"), tmp_path / "wiki.json").value
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_what_cannot_be_evaluated_is_one_line_and_writes_nothing(tmp_path, text):
    folder, lacking, broken = (tiny_model(tmp_path / name) for name in ("model", "lacking", "broken"))
    other = tiny_model(tmp_path / "other")
    edit_tensors(lacking, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    edit_tensors(broken, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|end|>"))
    long, vocabulary = settings(text, sequence_length=129), f"{folder}: its vocabulary .* is not that of the dense"
    for model, asked, dense, said in (
        (folder, long, None, "sequence_length: found 129, but the context length of .* is 128; lower it"),
        (broken, settings(text), None, f"{broken}: the logits are not finite .block 0, token 0"),
        (lacking, settings(text), None, "model.layers.1.mlp.up_proj.weight not in the checkpoint"),
        (folder, settings(text), other, f"{vocabulary} model {other}"),
    ):
        with pytest.raises(ArmorError, match=said):
            evaluate(model, asked, tmp_path / "wiki.json", dense=dense)
    assert not (tmp_path / "wiki.json").exists()


def test_a_packed_model_is_compared_to_its_source_on_the_same_blocks(tmp_path, text):
    root = packed(tmp_path)
    result = evaluate(root / "checkpoint", settings(text), tmp_path / "wiki.json", dense=root / "source")
    ids = AutoTokenizer.from_pretrained(root / "source")(text.read_text(), return_tensors="pt").input_ids[0]
    blocks = ids[: 5 * 48].view(5, 48)
    with torch.no_grad():
        q, p = (load_model(root / name)(blocks).logits[:, :-1].double() for name in ("checkpoint", "source"))
    by_block = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean(-1)
    found = result.against_dense
    assert found.kl.block_means == pytest.approx(by_block.tolist(), rel=1e-4)
    assert (found.kl.value, found.kl.standard_error) == mean(found.kl.block_means)
    assert found.top1.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 0 < found.top1.value < 1


def is_tokens(name: str, tensor: torch.Tensor) -> bool:
    """Whether an operation is an embedding and `tensor` the tokens that it is given: once in a forward pass."""
    return name == "embedding" and not tensor.is_floating_point()


def test_a_device_too_small_for_one_block_is_one_line(tmp_path, text):
    folder = tiny_model(tmp_path / "model")
    said = f"{folder} and {folder}: out of memory on cpu with one decoder layer and one block of 48 tokens; lower"
    with NoRoom(is_tokens), pytest.raises(ArmorError, match=said):
        evaluate(folder, settings(text), tmp_path / "wiki.json", dense=folder)
    assert not (tmp_path / "wiki.json").exists()


def test_a_device_too_small_for_the_model_is_one_line(tmp_path):
    folder = tiny_model(tmp_path / "model")
    said = f"{folder}: the model does not fit into the memory of the host: CUDA out of memory. Tried .* 1 GiB; take"
    with NoRoom(lambda *_: True), pytest.raises(ArmorError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def same(one, other) -> bool:
    """Whether two evaluations have the same numbers but for rounding, which may depend on where weights lie."""
    assert one.block_means == pytest.approx(other.block_means, rel=1e-6)
    if other.against_dense is not None:
        assert one.against_dense.kl.block_means == pytest.approx(other.against_dense.kl.block_means, rel=1e-5, abs=1e-9)
        assert one.against_dense.top1 == other.against_dense.top1
    return True


def streamed_of(caplog) -> list[str]:
    """The models that were read one decoder layer at a time, as the log has it."""
    return [line.partition(": about")[0] for line in caplog.messages if "one decoder layer at a time is read" in line]


@contextmanager
def forward_passes() -> Iterator[list[str]]:
    """The classes of the models whose logits are computed meanwhile, block by block."""
    seen = []

    def note(module, *_):
        if isinstance(module, PreTrainedModel) and module.base_model is not module:
            seen.append(type(module).__name__)

    hook = register_module_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def test_models_larger_than_the_memory_have_the_perplexity_of_loaded_ones(tmp_path, text, monkeypatch, caplog):
    """Within rounding, KL and agreement too."""
    caplog.set_level(logging.INFO, "armor")
    root = packed(tmp_path)
    folder, dense = root / "checkpoint", root / "source"
    alone = evaluate(folder, settings(text), tmp_path / "alone.json")
    beside = evaluate(folder, settings(text), tmp_path / "beside.json", dense=dense)
    assert alone.block_means == beside.block_means and streamed_of(caplog) == []
    host_of(monkeypatch, peak_bytes([folder, dense], "auto", 48) - 1)
    streamed = evaluate(folder, settings(text), tmp_path / "streamed.json", dense=dense)
    assert same(streamed, beside) and 0 < streamed.against_dense.kl.value
    host_of(monkeypatch, peak_bytes([folder], "auto", 48) - 1)
    assert same(evaluate(folder, settings(text), tmp_path / "streamed.json"), alone)
    assert streamed_of(caplog) == [f"{folder} and {dense}", str(folder)]


def test_a_streamed_run_that_was_killed_asks_only_for_the_blocks_that_had_not_come(tmp_path, text, monkeypatch):
    folder = tiny_model(tmp_path / "model")
    whole = evaluate(folder, settings(text), tmp_path / "whole.json", dense=folder)
    host_of(monkeypatch, peak_bytes([folder, folder], "auto", 48) - 1)

    def run():
        return evaluate(folder, settings(text), tmp_path / "wiki.json", dense=folder)

    assert not forked(run, tmp_path / "counter", SAVED, 4)  # the work, then a save for each block
    kept = len([*part_of(tmp_path / "wiki.json").glob("*.json")])
    with forward_passes() as seen:
        again = run()
    assert kept == 3 and len(seen) == 2 * (5 - kept)
    assert same(again, whole)


def test_loaded_models_for_which_memory_runs_out_are_streamed_from_the_block_where_it_did(tmp_path, text, caplog):
    caplog.set_level(logging.INFO, "armor")
    folder = tiny_model(tmp_path / "model")
    whole = evaluate(folder, settings(text), tmp_path / "whole.json", dense=folder)
    passes = itertools.count(1)
    with NoRoom(lambda *found: is_tokens(*found) and next(passes) == 5) as memory, forward_passes() as seen:
        again = evaluate(folder, settings(text), tmp_path / "wiki.json", dense=folder)
    assert memory.failed == 1 and streamed_of(caplog) == [f"{folder} and {folder}"]
    assert len(seen) == 2 * 5  # two blocks as they are loaded, three streamed
    assert same(again, whole)
