"""Logits on disk: safetensors' own reader reads them, they grow block by block, and each is held against its hash."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from armor.core.errors import ArmorError
from armor.format.logits import LogitsFile, read_logits


def written(path):
    file, tensors = LogitsFile(path, blocks=3, length=5, vocabulary=7, dtype=torch.float32), torch.randn(3, 5, 7)
    return file, tensors, [file.append(index, tensors[index]) for index in range(3)]


def test_what_is_read_is_what_was_written(tmp_path):
    file, tensors, hashes = written(tmp_path / "logits.safetensors")
    theirs = load_file(file.path)
    assert sorted(theirs) == ["logits.0", "logits.1", "logits.2"]
    for index, found in zip((2, 0), read_logits(file.path, hashes, (2, 0)), strict=True):
        assert torch.equal(found, tensors[index]) and torch.equal(theirs[f"logits.{index}"], tensors[index])


def test_the_bytes_of_a_small_file(tmp_path):
    file = LogitsFile(tmp_path / "logits.safetensors", blocks=1, length=2, vocabulary=1, dtype=torch.bfloat16)
    file.append(0, torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16))
    header = b'{"__metadata__":{"format_version":"1"},"logits.0":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}'
    expected = b"\x68" + bytes(7) + header.ljust(104) + b"\x80\x3f\x00\xc0"
    assert file.path.read_bytes() == expected


def test_a_file_that_was_cut_off_goes_on_after_its_last_whole_block(tmp_path):
    file, tensors, hashes = written(tmp_path / "logits.safetensors")
    whole = file.path.read_bytes()
    with open(file.path, "r+b") as opened:
        opened.truncate(len(file.header()) + file.block_bytes + 17)
    assert file.whole_blocks() == 1
    assert [file.append(index, tensors[index]) for index in (1, 2)] == hashes[1:]
    assert file.path.read_bytes() == whole


def test_what_was_not_written_so_is_refused(tmp_path):
    file, _, hashes = written(tmp_path / "logits.safetensors")
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    assert len(list(read_logits(file.path, hashes, (0, 1)))) == 2
    with pytest.raises(ArmorError, match=r"logits.safetensors: block 2: not what was written; run armor predict again"):
        list(read_logits(file.path, hashes, (0, 1, 2)))

    with pytest.raises(ArmorError, match="logits.safetensors: holds no block 3; run armor predict again"):
        list(read_logits(file.path, hashes, [3]))
    save_file({}, tmp_path / "other.safetensors")
    with pytest.raises(ArmorError, match="other.safetensors: format None, expected 1; run armor predict again"):
        list(read_logits(tmp_path / "other.safetensors", ["0"], [0]))
