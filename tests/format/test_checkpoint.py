import hashlib

import pytest
import torch

from armor.core.errors import ArmorError
from armor.core.packing import pack_mask, unpack_mask
from armor.core.pattern import Pattern, is_nm, top_n_mask
from armor.format.checkpoint import PackedLinear, check_tensor, modules_of, quantization_config, tombstone
from armor.format.checksums import tensor_sha256

TWO_FOUR = PackedLinear(64, 32, Pattern(2, 4), 16, 8)
HALF = PackedLinear(16, 12, Pattern(50, 0))


def test_what_the_config_says_can_be_read_back():
    modules = {"a.0": TWO_FOUR, "a.1": HALF, "b.0": TWO_FOUR}
    config = quantization_config(modules)
    assert [group["modules"] for group in config["groups"]] == [["a.0", "b.0"], ["a.1"]]
    assert modules_of(config) == modules and tombstone(modules_of(config)) == "a.0.weight"
    assert quantization_config(modules_of(config)) == config


@pytest.mark.parametrize(
    ("pattern", "columns"), [("2:4", 16), ("2:4", 12), ("1:2", 6), ("4:8", 24), ("2:3", 15), ("50%", 9)]
)
def test_a_mask_is_refused_exactly_when_it_breaks_the_pattern(pattern, columns):
    pattern = Pattern.parse(pattern)
    layout = PackedLinear(6, columns, pattern)
    bits = pack_mask(top_n_mask(torch.rand(6, columns), pattern))
    check_tensor("file", "m.core_mask", bits, {"m": layout})
    for place in range(bits.shape[1] * 8):  # any one bit flipped, those past the last column too
        broken = bits.clone()
        broken[4, place // 8] ^= 1 << place % 8
        assert place >= columns or not is_nm(unpack_mask(broken, columns), pattern)
        with pytest.raises(ArmorError, match="file: m.core_mask: row 4 does not keep"):
            check_tensor("file", "m.core_mask", broken, {"m": layout})


def test_numbers():
    tensor = torch.randn(3, 5).bfloat16()
    check_tensor("file", "m.left", tensor, {"m": TWO_FOUR})
    for value in (float("inf"), float("-inf"), float("nan")):
        broken = tensor.clone()
        broken[1, 2] = value
        with pytest.raises(ArmorError, match="file: m.left: 1 of 15 numbers"):
            check_tensor("file", "m.left", broken, {"m": TWO_FOUR})
    # A dense tensor of the source may hold infinity (attention masks do), not NaN.
    check_tensor("file", "other", torch.tensor([float("-inf"), 0.0]), {"m": TWO_FOUR})
    with pytest.raises(ArmorError, match="file: other: 1 of 2 numbers"):
        check_tensor("file", "other", torch.tensor([float("nan"), 0.0]), {"m": TWO_FOUR})


def test_the_hash_of_a_tensor_is_that_of_its_bytes():
    expected = hashlib.sha256(bytes.fromhex("0000803f00000040")).hexdigest()  # 1 and 2 in little-endian float32
    assert tensor_sha256(torch.tensor([1.0, 2.0])) == expected
    assert tensor_sha256(torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]) == expected
