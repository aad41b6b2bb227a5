"""What one could take instead: the front of hand-made points, and that the words say what the numbers do."""

from dataclasses import replace

from armor.report.front import BITS, KL, PERPLEXITY, SPEED, Offer, front, in_words
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


def test_of_equals_neither_beats_the_other():
    found = front([at(*point) for point in ((8, 20), (8, 20), (8, 21))], BITS, PERPLEXITY)
    assert [(offer.bits, offer.perplexity) for offer in found] == [(8, 20), (8, 20)]


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


def test_weights_from_a_file_of_few_bits_are_told():
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert f"a 4-bit file ({file})" in " ".join(in_words(ALL, file))
    assert "-bit file" not in " ".join(in_words(ALL, "model-F16.gguf"))


def test_the_figure_names_what_lies_too_far_above_to_be_drawn():
    far = Offer("magnitude", "magnitude", "pruned", 9, 2000.0, kl=4.0, speed=2.4)
    drawn = {panel.name: panel for panel in panels([*ALL, far], "m0")}["m0-bits"]
    assert drawn.caption.startswith("On the front: gptq, armor-int8, int8, dense.")
    assert drawn.caption.endswith(". Far above, and not drawn: magnitude 2,000.")
    assert ">armor-int8<" in drawn.svg and ">magnitude<" not in drawn.svg
