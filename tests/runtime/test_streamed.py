"""A streamed model: the logits of the loaded one, with one decoder layer in memory at a time."""

import pytest
import torch

from armor.core.errors import ArmorError
from armor.runtime import streamed as module
from armor.runtime.load import load_model, loaded_dtype
from armor.runtime.streamed import StreamedModel
from tests.packed import DEFECTS, packed
from tests.tiny import FAMILIES, tiny_model


@pytest.fixture
def batches():
    """Tokens in batches of several shapes, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(250, shape, generator=generator) for shape in ((4, 40), (3, 33), (1, 20), (1, 1))]


@pytest.fixture
def read(monkeypatch):
    """The numbers of the layers that are read, in order; asserts that no other is in memory then."""
    numbers = []

    def read_layer(skeleton, index, *arguments, real=module.read_layer):
        assert all(tensor.is_meta for layer in skeleton.layers for tensor in layer.state_dict().values())
        numbers.append(index)
        return real(skeleton, index, *arguments)

    monkeypatch.setattr(module, "read_layer", read_layer)
    return numbers


def check(folder, dtype, batches) -> None:
    model = load_model(folder, dtype)
    found = list(StreamedModel(folder, dtype).logits(batches))
    assert len(found) == len(batches)
    for logits, tokens in zip(found, batches, strict=True):
        assert logits.dtype == model.dtype == loaded_dtype(folder, dtype)
        torch.testing.assert_close(logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_has_the_loaded_ones_logits(tmp_path, batches, read, family, tied):
    check(tiny_model(tmp_path / "model", family, tie_word_embeddings=tied), "auto", batches)
    assert read == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases and with
def test_a_packed_model_has_the_loaded_ones_logits(tmp_path, batches, read, family, dtype):
    check(packed(tmp_path, family) / "checkpoint", dtype, batches)
    assert read == [0, 1]


def test_batches_that_have_no_room_wait_until_the_layers_are_read_again(tmp_path, batches, read, monkeypatch):
    folder = tiny_model(tmp_path / "model")
    whole = list(StreamedModel(folder).logits(batches))
    room = (3 * 33 + 20) * 64 * 4  # the hidden states of the second and the third batch
    monkeypatch.setattr(module, "host_memory_bytes", lambda: room / module.HIDDEN_STATES)
    again = list(StreamedModel(folder).logits(batches))
    assert read == [0, 1, 2] * 4 and all(map(torch.equal, whole, again))  # together, then the first, two, the last


def test_a_buffer_that_a_layer_computes_itself_is_there_when_it_is_read_again(tmp_path, batches):
    model = StreamedModel(tiny_model(tmp_path / "model"))
    model.skeleton.layers[1].register_buffer("computed", torch.ones(1), persistent=False)
    first, again = (list(model.logits(batches)) for _ in range(2))
    assert model.skeleton.layers[1].computed.item() == 1 and all(map(torch.equal, first, again))


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("hashed", [False, True])
def test_a_broken_checkpoint_is_refused(checkpoint, defect, hashed):
    if not hashed:
        (checkpoint / "checksums.json").unlink()
    change, named = DEFECTS[defect]
    change(checkpoint)
    with pytest.raises(ArmorError) as caught:
        StreamedModel(checkpoint)
    assert hashed or all(name in str(caught.value) for name in named)
