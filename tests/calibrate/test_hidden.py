"""Hidden states: what was written is read, wherever it is kept and after a restart; a full disk is one clear line."""

from __future__ import annotations

import pytest
import torch

from armor.calibrate.hidden import HiddenStates, states_file
from armor.core.errors import ArmorError


@pytest.mark.parametrize("kept", [0, 2, 9])
def test_what_was_written_is_read(tmp_path, kept):
    each, carried = 2 * 5 * 2 + 3 * 8, torch.arange(9).view(3, 3)
    states = torch.randn(3, 2, 5).bfloat16()
    likes = [(states[0],), (states[0], carried[0]), (states[0],)]
    with HiddenStates(3, likes, kept * each, tmp_path) as hidden:
        for layer, like in enumerate(likes):
            states = states + 1
            for index in (2, 0, 1):
                hidden.write(index, (states[index], carried[index])[: len(like)])
            hidden.turn()
            hidden.forget()
            for index in range(3):
                found = hidden.read(index)
                assert len(found) == len(like)
                assert all(map(torch.equal, found, (states[index], carried[index])))
            assert list(tmp_path.iterdir()) == [states_file(tmp_path, layer)]
        assert hidden.bytes == 3 * each and hidden.spilled_bytes == max(0, 3 - kept) * each


@pytest.mark.parametrize("kept", [0, 1])
def test_a_layers_input_outlives_a_process_that_dies_while_it_writes_the_output(tmp_path, kept):
    states = torch.randn(3, 4)
    likes = [(states[0],)] * 3
    with HiddenStates(3, likes, kept * 16, tmp_path) as hidden:
        for layer in range(2):
            for index in range(3):
                hidden.write(index, (states[index] + layer,))
            hidden.turn()
        hidden.write(0, (torch.zeros(4),))
    with HiddenStates(3, likes, kept * 16, tmp_path, layer=1) as again:
        assert all(torch.equal(again.read(index)[0], states[index] + 1) for index in range(3))
        assert list(tmp_path.iterdir()) == [states_file(tmp_path, 1)]


def test_a_file_that_was_cut_off_is_one_line(tmp_path):
    likes = [(torch.zeros(4),)] * 3
    with HiddenStates(2, likes, 0, tmp_path) as hidden:
        for _ in range(2):
            for index in range(2):
                hidden.write(index, likes[0])
            hidden.turn()
    file = states_file(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:20])
    with HiddenStates(2, likes, 0, tmp_path, layer=1) as again, pytest.raises(ArmorError, match="is too short; delete"):
        again.read(1)


def test_a_disk_too_small_is_noticed_before_the_work(tmp_path):
    with pytest.raises(ArmorError, match="need 8e\\+06 GB on this disk: .* GB are free"):
        HiddenStates(1_000_000_000, [(torch.empty(1_000_000, device="meta"),)], 0, tmp_path)
