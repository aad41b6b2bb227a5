"""The decode benchmark: what its record holds, and that sizes are those of the files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from armor.benchmark import generation
from armor.benchmark.generation import benchmark, bytes_per_token, generation_speed, greedy_text
from armor.config.measures import BenchmarkSettings
from armor.config.recipes import LayerSettings
from armor.core.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.runtime.load import load_model, load_tokenizer
from tests.packed import SETTINGS as LAYERS
from tests.packed import packed
from tests.tiny import tiny_model

SETTINGS = BenchmarkSettings(prompt_tokens=4, new_tokens=6, repeats=3, batch_sizes=[3, 1], prompts=["A fox", "42"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("dense") / "model", layers=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    """A benchmark of a model against another dense one that stands in for its compressed self."""
    results = tmp_path_factory.mktemp("results") / "recipe"
    small = tiny_model(results / "checkpoint", layers=1)
    output = results / "benchmark" / "decode.json"
    return benchmark(folder, small, SETTINGS, output), output


def test_the_record_describes_both_sides(both):
    result, output = both
    assert read_json(output) == result
    assert (result["case"], result["recipe"]) == ("decode", "recipe")
    for side in (result["dense"], result["compressed"]):
        assert list(side["tokens_per_second"]) == ["1", "3"]
        for speed in (speed for phases in side["tokens_per_second"].values() for speed in phases.values()):
            low, high = speed["quartiles"]
            assert len(speed["runs"]) == SETTINGS.repeats
            assert 0 < min(speed["runs"]) <= low <= speed["median"] <= high <= max(speed["runs"])
        assert side["load_seconds"] > 0 and side["peak_bytes"] >= side["resident_bytes"]
    for batch, phases in result["speedup"].items():
        for phase, ratio in phases.items():
            own, dense = (result[side]["tokens_per_second"][batch][phase]["runs"] for side in ("compressed", "dense"))
            assert ratio["runs"] == [a / b for a, b in zip(own, dense, strict=True)]
    bytes_of = [result[side]["bytes_per_token"] for side in ("dense", "compressed")]
    assert result["theoretical_speedup"] == bytes_of[0] / bytes_of[1]
    assert result["linears"] == [] and result["core"] is None  # neither side has a packed one


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_every_weight_but_a_table_that_is_no_head(tmp_path, tied):
    root = packed(tmp_path, tie_word_embeddings=tied)
    for folder in (root / "source", root / "checkpoint"):
        tensors = load_file(folder / "model.safetensors")
        stored = sum(t.numel() * t.element_size() for t in tensors.values())
        table = tensors["model.embed_tokens.weight"]
        expected = stored - (0 if tied else table.numel() * table.element_size())
        assert bytes_per_token(folder, load_model(folder)) == expected


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("blocks"))


def measured(root, monkeypatch):
    monkeypatch.setattr(generation, "measure_loading", lambda *_: {"resident_bytes": 1})
    settings = SETTINGS.model_copy(update={"prompts": []})
    return benchmark(root / "source", root / "checkpoint", settings, root / "decode.json")


def test_the_core_alone_is_a_third_side_of_every_round(blocks, monkeypatch):
    seen = []
    speed = generation.generation_speed

    def noted(model, *arguments):
        linear = model.model.layers[0].mlp.down_proj
        seen.append("dense" if type(linear) is torch.nn.Linear else "core" if linear.left is None else "compressed")
        return speed(model, *arguments)

    monkeypatch.setattr(generation, "generation_speed", noted)
    result = measured(blocks, monkeypatch)
    turns = ["dense", "compressed", "core"]
    assert seen == turns * 2 + turns * 2 + turns[::-1] * 2 + turns * 2  # two batch sizes; the first turns warm up
    for batch, phases in result["core"]["speedup"].items():
        for phase, ratio in phases.items():
            own, dense = (result[side]["tokens_per_second"][batch][phase]["runs"] for side in ("core", "dense"))
            assert ratio["runs"] == [a / b for a, b in zip(own, dense, strict=True)]
            assert len(own) == SETTINGS.repeats
    assert list(result["core"]["tokens_per_second"]) == list(result["core"]["speedup"]) == ["1", "3"]


def test_the_bytes_of_the_core_are_those_of_a_model_pruned_to_its_pattern(blocks, tmp_path, monkeypatch):
    pruned = packed(tmp_path, settings=LayerSettings(method="magnitude"))
    with_blocks, without = measured(blocks, monkeypatch), measured(pruned, monkeypatch)
    core, expected = with_blocks["core"], without["compressed"]
    assert without["core"] is None
    assert core["bytes_per_token"] == expected["bytes_per_token"] < with_blocks["compressed"]["bytes_per_token"]
    assert core["theoretical_speedup"] == without["theoretical_speedup"]
    assert core["bits_per_weight"] == pytest.approx(expected["bits_per_weight"])
    tensors = load_file(blocks / "checkpoint" / "model.safetensors")
    saved = sum(t.nbytes for name, t in tensors.items() if name.endswith((".left", ".right")))
    assert core["bytes_on_disk"] == with_blocks["compressed"]["bytes_on_disk"] - saved


def test_the_bits_of_the_core_count_the_linears_that_stay_dense(tmp_path):
    dense = [{"modules": "*.down_proj", "method": "dense"}]
    settings = [LAYERS.model_dump() | {"method": m, "overrides": dense} for m in ("armor", "magnitude")]
    roots = [packed(tmp_path / own["method"], settings=LayerSettings(**own)) for own in settings]
    core, pruned = (generation._on_disk(root / "checkpoint") for root in roots)
    core = generation._core_on_disk(roots[0] / "checkpoint", core)
    assert core["bits_per_weight"] == pytest.approx(pruned["bits_per_weight"])


def test_speed_counts_the_tokens_of_all_sequences(folder, monkeypatch):
    marks = iter(range(100))
    monkeypatch.setattr(generation, "mark", lambda _: float(next(marks) ** 2))  # the prompt at 0, tokens at 1, 4, 9, 16
    prompt = torch.ones(3, 5, dtype=torch.int64)
    assert generation_speed(load_model(folder), prompt, 4) == {"prefill": 3 * 5 / 1, "decode": 3 * 3 / 15}


def test_the_samples_are_what_each_side_finds_the_most_likely_token_after_token(both, folder):
    result, output = both
    tokenizer = load_tokenizer(folder)
    models = {"dense": load_model(folder), "compressed": load_model(output.parents[1] / "checkpoint")}
    expected = []
    for prompt in SETTINGS.prompts:
        expected.append({"prompt": prompt})
        for side, model in models.items():
            tokens = start = tokenizer(prompt, return_tensors="pt").input_ids
            for _ in range(SETTINGS.new_tokens):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
            assert model.config.eos_token_id not in tokens
            expected[-1][side] = tokenizer.decode(tokens[0, start.shape[1] :])
    assert result["samples"] == expected


def test_a_sample_ends_with_the_text(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    last = model(tokenizer("A", return_tensors="pt").input_ids).logits[0, -1].argmax().item()
    assert len(greedy_text(model, tokenizer, "A", 50)) > 10
    model.generation_config.eos_token_id = [256, last]
    assert greedy_text(model, tokenizer, "A", 50) == tokenizer.decode(last)


def test_sizes_are_those_of_the_files(both, folder):
    result, output = both
    small = output.parents[1] / "checkpoint"
    assert result["dense"]["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert result["compressed"]["bytes_on_disk"] == (small / "model.safetensors").stat().st_size
    assert result["dense"]["bits_per_weight"] == 16
    assert result["compressed"]["bits_per_weight"] == 32


def test_bits_of_a_packed_checkpoint_are_those_of_its_record(folder, tmp_path):
    packed = tmp_path / "checkpoint"
    shutil.copytree(folder, packed)
    write_json(packed / "config.json", read_json(packed / "config.json") | {"quantization_config": {}})
    assert generation._on_disk(packed)["bits_per_weight"] is None
    write_json(tmp_path / "checkpoint.json", {"bits_per_weight": 9.5})
    assert generation._on_disk(packed)["bits_per_weight"] == 9.5


def test_the_dense_model_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "measure_loading", lambda *_: {"resident_bytes": 1})
    monkeypatch.setattr(generation, "load_tokenizer", lambda _: pytest.fail("there is no text to read"))
    settings = SETTINGS.model_copy(update={"repeats": 1, "prompts": []})
    result = benchmark(folder, None, settings, tmp_path / "decode.json")
    assert (result["recipe"], result["compressed"], result["samples"]) == ("dense", None, [])
    assert (result["speedup"], result["theoretical_speedup"], result["linears"]) == (None, None, [])
    speed = result["dense"]["tokens_per_second"]["1"]["decode"]
    assert speed["quartiles"] == [speed["median"]] * 2


def test_an_end_of_text_does_not_end_decoding(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # every greedy choice would be the end of the text
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.eos_token_id] = model.model.norm.weight
    assert generation_speed(model, torch.tensor([[5, 6]]), 8)["decode"] > 0


def test_a_batch_too_large_for_the_device_is_one_line(root, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(generation, "generation_speed", full)
    said = f"{root / 'source'}: out of memory on cpu with batches of up to 4 sequences; lower batch_sizes"
    with pytest.raises(ArmorError, match=said):
        benchmark(root / "source", None, BenchmarkSettings(prompts=[]), tmp_path / "decode.json")
    assert not (tmp_path / "decode.json").exists()


def test_a_folder_without_a_model_is_refused(folder, tmp_path):
    with pytest.raises(ArmorError, match=str(tmp_path)):
        benchmark(folder, tmp_path, SETTINGS, tmp_path / "decode.json")
    with pytest.raises(ArmorError, match="cannot load this model"):
        write_json(tmp_path / "config.json", {"model_type": "llama"})
        load_model(tmp_path)
