"""What one could take instead: the front of hand-made points, and that the words say what the numbers do."""

from dataclasses import replace

import pytest

from armor.report.front import BITS, KL, PERPLEXITY, SPEED, Offer, front, in_words, table
from armor.report.front_figures import panels

DENSE = Offer("dense", "dense", "dense", 16, 20.0, speed=1.0)
INT8 = Offer("int8", "int8", "pruned", 8.03, 20.1, kl=0.001, speed=0.5, expanded=True)
GPTQ = Offer("gptq", "GPTQ", "pruned", 4.13, 24.0, kl=0.1, speed=0.4, expanded=True)
NOWAG = Offer("nowag", "NoWag-P", "pruned", 9, 90.0, kl=1.5, speed=2.5)
ARMOR = Offer("armor", "ARMOR", "blocks", 11.9, 22.0, kl=0.08, speed=1.5)
ARMOR8 = Offer("armor-int8", "ARMOR", "blocks", 6.65, 22.2, kl=0.09, speed=2.0)
ALL = (GPTQ, ARMOR8, INT8, NOWAG, ARMOR, DENSE)


def names(found):
    return [offer.name for offer in found]


def at(bits, perplexity, **more):
    return Offer(f"{bits} {perplexity}", "ARMOR", "blocks", bits, perplexity, **more)


def test_the_front_is_what_no_other_equals_and_beats():
    assert names(front(ALL, BITS, PERPLEXITY)) == ["gptq", "armor-int8", "int8", "dense"]
    assert names(front(ALL, SPEED, PERPLEXITY)) == ["nowag", "armor-int8", "armor", "dense"]
    assert names(front(ALL, BITS, KL)) == ["gptq", "armor-int8", "int8"]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(8, 20), (8, 20)], [(8, 20), (8, 20)]),  # alike in both: neither beats the other
        ([(8, 20), (8, 21)], [(8, 20)]),
        ([(9, 19), (8, 20), (8.5, 20.5)], [(8, 20), (9, 19)]),
    ],
)
def test_ties_and_single_points(points, expected):
    assert [(c.bits, c.perplexity) for c in front([at(*point) for point in points], BITS, PERPLEXITY)] == expected


def test_without_a_benchmark_there_is_no_front_of_speed_and_the_words_say_so():
    offered = [at(6, 22.0), at(12, 21.0)]
    assert front(offered, SPEED, PERPLEXITY) == []
    *first, last = in_words(offered)
    assert "fast" not in " ".join(first) and last == "No speed was measured."
    assert [panel.name for panel in panels(offered, "m0")] == ["m0-bits"]


def test_the_words_name_the_best_whoever_made_it_and_ours_beside_it():
    smallest, _, middle, *_, speed = in_words(ALL)
    assert smallest.startswith("At most 5 bits a weight: gptq is the best, with a perplexity of 24.00 (1.20 times")
    assert smallest.endswith(" No recipe of ARMOR is that small.")
    assert middle == (
        "At most 9 bits a weight: int8 is the best, with a perplexity of 20.10 (1.01 times the dense model's) at 8.03 "
        "bits. The best of ARMOR is armor-int8, with a perplexity of 22.20 (1.11 times the dense model's) at 6.65 "
        "bits, 2.0 times as fast as dense."
    )
    assert "dense (1.0 times as fast as dense, 20.00), armor (1.5 times as fast as dense, 22.00), armor-int8" in speed
    assert "Not compared: gptq, int8." in speed
    *_, speed = in_words((GPTQ, replace(INT8, speed=1.8, expanded=False), ARMOR8, DENSE))  # a kernel multiplies
    assert "int8 (1.8 times as fast as dense, 20.10)" in speed and "Not compared: gptq." in speed


def test_limits_with_one_answer_are_one_sentence_and_an_empty_one_is_said():
    assert in_words([at(12, 30.0)])[0] == "No recipe takes at most 5, 7 or 9 bits a weight."
    assert in_words([at(5, 30.0)])[0].startswith("At most 5, 7, 9 or 12 bits a weight: 5 30.0 is the best")
    offered = [at(8, 20.0, speed=1.0), at(6, 20.0, speed=1.0), Offer("fast", "ARMOR", "blocks", 6, 20.0, speed=2.0)]
    assert "At most 7, 9 or 12 bits a weight: fast is the best" in in_words(offered)[1]  # of equals the smaller, faster


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "a 4-bit file (SmolLM2-135M-Instruct.Q4_1.gguf)"),
        ("gemma-3-270m-q4_k_m.gguf.part00", "a 4-bit file"),
        ("model-IQ3_XS-00001-of-00002.gguf", "a 3-bit file"),
        ("model-F16.gguf", None),
    ],
)
def test_weights_from_a_file_of_few_bits_are_told(file, said):
    found = " ".join(in_words(ALL, file))
    assert said in found if said else "-bit file" not in found


def test_the_table_has_every_recipe_and_where_it_is_on_a_front():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(ALL).markdown().splitlines()]
    rows = {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}
    assert list(rows) == names(ALL)
    fronts = {name: row["On the front of"].strip("*") for name, row in rows.items()}
    assert [fronts[name] for name in ("dense", "int8", "armor")] == ["bits and speed", "bits", "speed"]
    assert rows["int8"]["Speed"] == "(0.500 ×)" and rows["armor-int8"]["Speed"] == "2.00 ×"
    assert rows["dense"]["KL"] == "–" and rows["armor"]["Beside dense"] == "1.100 ×"


def test_the_figure_has_all_recipes_and_names_those_that_lie_too_far_above():
    far = Offer("magnitude", "magnitude", "pruned", 9, 2000.0, kl=4.0, speed=2.4)
    drawn = {panel.name: panel for panel in panels([*ALL, far], "m0")}
    assert list(drawn) == ["m0-bits", "m0-speed", "m0-kl-bits", "m0-kl-speed"]
    for panel in (drawn["m0-bits"], drawn["m0-speed"]):
        assert "magnitude 2,000" in panel.svg and panel.caption.endswith(". Far above, and not drawn: magnitude 2,000.")
        assert ">armor-int8<" in panel.svg and ">magnitude<" not in panel.svg
    assert ">int8<" in drawn["m0-bits"].svg and ">int8<" not in drawn["m0-speed"].svg
    assert drawn["m0-bits"].caption.startswith("On the front: gptq, armor-int8, int8, dense.")
    assert panels([DENSE], "m0") == []
