"""Stored predictions: the same numbers as of a dense model run beside, and what does not fit is refused."""

import pytest
import torch
from safetensors.torch import load_file

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError
from armor.evaluate.perplexity import evaluate
from armor.evaluate.predictions import predict
from armor.format.names import logits_beside
from armor.format.records.predictions import PredictionsRecord
from armor.runtime.folder import load_tokenizer
from armor.runtime.load import load_model
from tests.killed import HALF, killed_everywhere, left_over
from tests.packed import packed
from tests.tiny import tiny_model, tiny_text

BLOCKS, LENGTH = 4, 48
DENSE = {"fingerprint": "checkpoint's", "dense_fingerprint": "source's"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text(60))
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("tied"), "qwen2")


def settings(text, **changes) -> EvaluationSettings:
    given = {"text": {"files": [str(text)]}, "sequences": BLOCKS, "sequence_length": LENGTH}
    return EvaluationSettings(**given | changes)


def predicted(root, asked, folder, name="wiki"):
    """The path of the record of the predictions of root / "source"."""
    predict(root / "source", asked, folder / f"{name}.json", fingerprint="source's")
    return folder / f"{name}.json"


def same(one, other):
    """Whether two evaluations have the same numbers."""
    assert one.block_means == pytest.approx(other.block_means, rel=1e-6)
    for name in ("kl", "top1"):
        here, there = getattr(one.against_dense, name), getattr(other.against_dense, name)
        assert here.block_means == pytest.approx(there.block_means, rel=1e-6, abs=1e-9)
        assert (here.value, here.standard_error) == pytest.approx((there.value, there.standard_error), rel=1e-6)
    return True


def test_stored_predictions_give_the_numbers_of_a_dense_model_beside(root, tied, tmp_path, text):
    for own, dtype in ((root, "auto"), (tied, "bfloat16")):
        asked = settings(text, dtype=dtype)
        beside = evaluate(own / "checkpoint", asked, tmp_path / "beside.json", dense=own / "source", **DENSE)
        path = predicted(own, asked, tmp_path / own.parent.name)
        stored = evaluate(own / "checkpoint", asked, tmp_path / "stored.json", predictions=path, **DENSE)
        assert same(stored, beside) and stored.against_dense.kl.value > 0
        assert stored.made_by.inputs == beside.made_by.inputs
        assert left_over(tmp_path) == []


def test_the_logits_are_those_of_the_model(root, tmp_path, text):
    record = PredictionsRecord.read(predicted(root, settings(text), tmp_path))
    stored = load_file(logits_beside(tmp_path / "wiki.json"))
    tokens = load_tokenizer(root / "source")(text.read_text(), return_tensors="pt").input_ids[0]
    with torch.no_grad():
        logits = load_model(root / "source")(tokens[: BLOCKS * LENGTH].view(BLOCKS, LENGTH)).logits
    for index in range(BLOCKS):
        torch.testing.assert_close(stored[f"logits.{index}"], logits[index])
    assert record.logits_bytes == logits.nbytes and len(record.hashes) == BLOCKS and record.not_stored is None


def test_the_dense_models_own_evaluation_needs_no_weights(tmp_path, text):
    folder = tiny_model(tmp_path / "source")
    run = evaluate(folder, settings(text), tmp_path / "run.json")
    path = predicted(tmp_path, settings(text), tmp_path / "predictions")
    logits_beside(path).unlink()
    (folder / "model.safetensors").unlink()
    taken = evaluate(folder, settings(text), tmp_path / "taken.json", fingerprint="source's", predictions=path)
    assert taken.block_means == pytest.approx(run.block_means, rel=1e-6) and taken.against_dense is None
    assert taken.text_fingerprint == run.text_fingerprint and taken.tokens == run.tokens


def test_over_the_budget_nothing_is_stored(root, tmp_path, text):
    needed = BLOCKS * LENGTH * 272 * 4 / 1e9
    asked = settings(text, predictions_gb=needed / 2)
    path = predicted(root, asked, tmp_path)
    record = PredictionsRecord.read(path)
    assert record.hashes is None and "predictions_gb is 0.000104" in record.not_stored
    assert not logits_beside(path).exists()
    with pytest.raises(ArmorError, match=r"wiki.json: without logits \(they take .*\); name the dense"):
        evaluate(root / "checkpoint", asked, tmp_path / "found.json", predictions=path, **DENSE)


def test_without_its_logits_a_record_lets_the_dense_model_run_beside(root, tmp_path, text):
    path = predicted(root, settings(text), tmp_path)
    common = {"predictions": path, **DENSE}
    stored = evaluate(root / "checkpoint", settings(text), tmp_path / "stored.json", **common)
    logits_beside(path).unlink()
    beside = evaluate(root / "checkpoint", settings(text), tmp_path / "beside.json", dense=root / "source", **common)
    assert same(beside, stored) and beside.made_by == stored.made_by


def test_predictions_of_something_else_are_one_line_and_nothing_is_written(root, tmp_path, text):
    path = predicted(root, settings(text), tmp_path)
    changed, file = predicted(root, settings(text), tmp_path, "changed"), logits_beside(tmp_path / "changed.json")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for given, changes, said in (
        (path, {"sequence_length": 32}, f"{path}: text .SHA-256 of the tokens.: found"),
        (path, {"dtype": "bfloat16"}, f"{path}: dtype: found auto, expected bfloat16"),
        (path, {"dense": "another's"}, f"{path}: dense model: found source's, expected another's"),
        (changed, {}, f"{file}: block {BLOCKS - 1}: not what was written; run armor predict again"),
    ):
        dense = changes.pop("dense", "source's")
        with pytest.raises(ArmorError, match=said) as caught:
            asked = settings(text, **changes)
            out = tmp_path / "out.json"
            evaluate(root / "checkpoint", asked, out, predictions=given, fingerprint="c", dense_fingerprint=dense)
        assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()


def test_a_run_that_was_killed_in_the_middle_of_a_block_goes_on_after_the_one_before(root, tmp_path, text):
    assert killed_everywhere(lambda folder: predicted(root, settings(text), folder), tmp_path, HALF)
