"""The loop of training: the best look is kept, what diverges is not, and a kill anywhere changes no byte."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from armor.config.training import TrainingSettings
from armor.core.errors import ArmorError
from armor.execution.resume import resumable
from armor.training.fit import fit, order

SETTINGS = {"steps": 24, "batch": 2, "sequences": 5, "held_out": 1, "warm_up": 2, "rate": 0.1}


class Problem:
    """Least squares: the loss of sequence i is the mean square of value - target_i; of the last, held out, target 1.

    It is killed after `dies` steps, and the look after step `diverges` finds a divergence; the next ones are true.
    """

    def __init__(self, dtype=torch.float32, dies=math.inf, diverges=-1):
        self.value, self.more = nn.Parameter(torch.full((3, 2), 4.0)), nn.Parameter(torch.ones(3, 2))
        self.targets = [0.8, 0.9, 1.0, 1.1, 1.2, 1.0]
        self.dtypes = {"value": dtype, "more": dtype}
        self.dies, self.diverges = dies, diverges
        self.learnt = 0  # sequences

    def loss(self, index):
        if index == 5:
            return self.held_out_loss()
        self.learnt += 1
        if self.learnt > 2 * self.dies:
            raise KeyboardInterrupt
        return self.error(index)

    def error(self, index):
        return (self.value - self.targets[index]).square().mean() + 0.01 * self.more.square().mean()

    def held_out_loss(self):
        return self.error(5) * (100 if self.learnt == 2 * self.diverges else 1)

    def looks(self, *losses):
        """Let looks at the held-out sequence find these losses."""
        found = map(torch.tensor, losses)
        self.held_out_loss = lambda: next(found)

    def fit(self, steps=None, **settings):
        asked = TrainingSettings(**SETTINGS | settings)
        how = {"loss": self.loss, "dtype": "float32", "device": "cpu", "seed": 3, "where": "it", "steps": steps}
        return fit({"value": self.value, "more": self.more}, self.dtypes, asked, **how)


def test_every_sequence_comes_once_before_any_comes_again():
    line = sum(order(TrainingSettings(**SETTINGS), 0), [])
    assert len(line) == 48
    for start in range(0, 45, 5):
        assert sorted(line[start : start + 5]) == [0, 1, 2, 3, 4]
    assert order(TrainingSettings(**SETTINGS), 0) != order(TrainingSettings(**SETTINGS), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_is_the_best_look_as_stored(dtype):
    problem = Problem(dtype)
    found = problem.fit()
    assert [look.step for look in found.looks] == [0, *range(3, 25, 3)] and found.steps == 24
    assert found.best == min(look.held_out_loss for look in found.looks) < found.looks[0].held_out_loss
    assert problem.held_out_loss().item() == found.best
    assert problem.value.data.equal(problem.value.data.to(dtype).float())


def test_what_diverges_is_kept_as_it_was_and_said_in_one_line(caplog):
    problem = Problem()
    found = problem.fit(rate=5e3)
    assert found.diverged and found.kept == 0 and found.steps < 24 and len(found.restarts) == 2
    assert (problem.value == 4.0).all() and problem.value.grad is None
    (said,) = caplog.messages
    assert said.startswith(f"it: diverged at step {found.steps}, kept as it was; lower the rate (5000, ")


def test_a_loss_that_is_no_number_is_a_divergence():
    problem = Problem()
    problem.error = lambda index: problem.value.sum() * (math.nan if index < 5 else 0.0)
    assert problem.fit().diverged and (problem.value == 4.0).all()
    problem.held_out_loss = lambda: torch.tensor(math.inf)
    with pytest.raises(ArmorError, match="it: its held-out loss is inf before the first step"):
        problem.fit()


def test_nothing_to_train_is_one_line():
    with pytest.raises(ArmorError, match="^it: without core it has nothing to train: .*; set core: true"):
        fit({}, {}, TrainingSettings(core=False), loss=abs, dtype="float32", device="cpu", seed=0, where="it")


def test_where_a_rate_is_too_high_it_begins_again_at_a_quarter_of_it(caplog):
    """As a training that had that rate from the first."""
    problem, asked = Problem(diverges=3), Problem()
    expected, found = asked.fit(rate=0.1 / 4), problem.fit()
    assert problem.value.equal(asked.value) and problem.more.equal(asked.more)
    assert found.restarts == (3,) and found.steps == 27 and found.kept == expected.kept + 3 and not found.diverged
    assert [look.step for look in found.looks] == [0, *range(6, 28, 3)]
    (said,) = caplog.messages
    assert said.startswith("it: a rate of 0.1 was too high by step 3; trained at 0.025")


def test_what_does_not_help_is_said_in_one_line(caplog):
    problem = Problem()
    problem.looks(*[1.0] * 25)
    assert problem.fit().kept == 0 and (problem.value == 4.0).all()
    (said,) = caplog.messages
    assert said.startswith("it: none of 72 steps lowered the held-out loss, at rates of 0.1 to 0.00625")


def test_patience(caplog):
    problem = Problem()
    problem.looks(1.0, 0.5, 0.6, 0.7, 0.1)
    found = problem.fit(patience=2)
    assert found.kept == 3 and found.steps == 9 and not found.diverged and not caplog.records


@pytest.mark.parametrize(("diverges", "file_bytes"), [(-1, 100), (3, 10**9)])
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, monkeypatch, diverges, file_bytes):
    """With what is saved in one file and in one for each parameter; where a look finds a divergence, which is then not
    on the disk."""
    monkeypatch.setattr("armor.training.fit.FILE_BYTES", file_bytes)
    whole = Problem(diverges=diverges)
    expected = whole.fit()
    for kill in range(expected.steps):
        with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "a", "armor.training.fit", "cpu") as steps:
            Problem(dies=kill, diverges=diverges).fit(steps)
        again, saved = Problem(diverges=diverges), kill // 3 * 3
        again.learnt = 2 * (saved - 3 if saved == diverges else saved)
        with resumable(tmp_path / "a", "armor.training.fit", "cpu") as steps:
            found = again.fit(steps)
        assert found == expected and again.value.equal(whole.value) and again.more.equal(whole.more)
        assert again.learnt == 2 * expected.steps
        assert not any(tmp_path.iterdir())


def test_a_pair_may_start_at_zero():
    """As LoRA's does; its U is then trained at the rate of its V."""
    up, down = nn.Parameter(torch.zeros(3, 1)), nn.Parameter(torch.full((1, 2), 0.5))
    parameters = {"q.up": up, "q.down": down}
    settings = TrainingSettings(steps=1, warm_up=0, batch=1, sequences=1, held_out=1, rate=0.1)
    how = {"loss": lambda _: (up @ down - 1).square().mean(), "dtype": "float32", "device": "cpu"}
    fit(parameters, dict.fromkeys(parameters, torch.float32), settings, seed=0, where="it", **how)
    torch.testing.assert_close(up.detach(), torch.full((3, 1), 0.05))
    assert torch.equal(down.detach(), torch.full((1, 2), 0.5))  # U was zero, so nothing said where V should go
