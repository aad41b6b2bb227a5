import pytest
import torch

from armor.core.pattern import Pattern, is_nm, top_n_mask

PATTERNS = ["2:4", "1:4", "2:8", "4:8", "1:2", "50%", "30%"]


@pytest.mark.parametrize("text", PATTERNS)
def test_mask_keeps_exactly_n_of_m_and_the_largest(text):
    pattern = Pattern.parse(text)
    score = torch.rand(5, 16)
    mask = top_n_mask(score, pattern)
    assert is_nm(mask, pattern)
    n, m = pattern.group(16)
    kept = score.masked_fill(~mask, torch.inf).reshape(5, -1, m).amin(-1)
    dropped = score.masked_fill(mask, -torch.inf).reshape(5, -1, m).amax(-1)
    assert (kept >= dropped).all()


def test_ties_go_to_the_leftmost():
    assert top_n_mask(torch.zeros(1, 8), Pattern(2, 4)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize("text", PATTERNS)
def test_text_round_trip(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("value", ["3:2", "0:4", "4", "150%", "0%", 2, None])
def test_nonsense_is_refused(value):
    with pytest.raises(ValueError, match="expected n:m"):
        Pattern.parse(value)


def test_a_row_that_does_not_divide_is_refused():
    assert not Pattern(2, 4).fits(6)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        Pattern(2, 4).group(6)
