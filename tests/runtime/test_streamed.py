"""A streamed model: the logits of the loaded one, with one decoder layer in memory at a time."""

import pytest
import torch

from armor.runtime.apart import HOST_SHARE
from armor.runtime.load import load_model, loaded_dtype
from armor.runtime.streamed import StreamedModel
from armor.runtime.streaming import stream_model
from tests.memory import host_of
from tests.packed import packed, quantized
from tests.tiny import FAMILIES, SHARING, tiny_model


@pytest.fixture
def batches():
    """Tokens in batches of several shapes, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(250, shape, generator=generator) for shape in ((4, 40), (3, 33), (1, 20), (1, 1))]


def watched(folder, dtype="auto") -> tuple[StreamedModel, list[int]]:
    """A streamed model, and the numbers of the layers that it will have read, in order.

    A layer is known by its hook, which every copy of it takes along; no other may be in memory when it runs.
    """
    model, numbers, last = stream_model(folder, dtype), [], None

    def hook(index: int):
        def note(layer: torch.nn.Module, _: tuple) -> None:
            nonlocal last
            assert all(tensor.is_meta for other in model.skeleton.layers for tensor in other.state_dict().values())
            assert not any(tensor.is_meta for tensor in layer.state_dict().values())
            if layer is not last:
                numbers.append(index)
            last = layer

        return note

    for index, layer in enumerate(model.skeleton.layers):
        layer.register_forward_pre_hook(hook(index))
    return model, numbers


def check(folder, dtype, batches, layers) -> None:
    model = load_model(folder, dtype)
    streamed, read = watched(folder, dtype)
    found = list(streamed.logits(batches))
    assert len(found) == len(batches)
    for logits, tokens in zip(found, batches, strict=True):
        assert logits.dtype == model.dtype == loaded_dtype(folder, dtype)
        expected = model(tokens).logits
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[model.dtype]
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert read == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_has_the_loaded_ones_logits(tmp_path, batches, family):
    check(tiny_model(tmp_path / "model", family), "auto", batches, [0, 1, 2])


@pytest.mark.parametrize("family", SHARING)
def test_what_layers_take_of_earlier_ones_is_carried(tmp_path, batches, family):
    folder = tiny_model(tmp_path / "model", family)
    model, streamed = load_model(folder), stream_model(folder)
    for tokens, logits in zip(batches, streamed.logits(batches), strict=True):
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert any(carried for carried, _ in streamed.skeleton.links)


def test_a_packed_model_of_floats_or_integers_has_the_loaded_ones_logits(tmp_path, batches):
    root = packed(tmp_path, "qwen2")  # with biases
    check(root / "checkpoint", "bfloat16", batches, [0, 1])
    check(quantized(root, max_shard_bytes=100_000), "auto", batches, [0, 1])


def test_batches_that_have_no_room_wait_until_the_layers_are_read_again(tmp_path, batches, monkeypatch):
    folder = tiny_model(tmp_path / "model")
    whole = list(stream_model(folder).logits(batches))
    room = (3 * 33 + 20) * 64 * 4  # the hidden states of the second and the third batch
    host_of(monkeypatch, room / HOST_SHARE)
    streamed, read = watched(folder)
    torch.testing.assert_close(list(streamed.logits(batches)), whole)
    assert read == [0, 1, 2] * 3  # the first, the next two, the last
