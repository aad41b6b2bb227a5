"""The benchmark: what its record holds, that all models take turns, and that sizes are those of the files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from armor.benchmark.generation import benchmark, bytes_on_disk, bytes_per_token, core_on_disk
from armor.benchmark.loading import measure_loading
from armor.benchmark.speed import generation_speed
from armor.config.layers import LayerSettings
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.format.records.benchmark import BenchmarkRecord
from armor.runtime.folder import load_tokenizer
from armor.runtime.linear import ArmorLinear
from armor.runtime.load import load_model
from tests.memory import NoRoom, host_of
from tests.packed import packed
from tests.tiny import tiny_model

SETTINGS = BenchmarkSettings(prompt_tokens=4, new_tokens=6, repeats=3, batch_sizes=[3, 1], prompts=["A fox", "42"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("dense") / "model", layers=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The same model as `root`'s, without blocks."""
    return packed(tmp_path_factory.mktemp("pruned"), settings=LayerSettings(method="magnitude"))


@pytest.fixture(scope="module")
def result(root, pruned, tmp_path_factory):
    """A benchmark of a model beside two recipes, one with blocks and one without."""
    recipes = {"armor": root / "checkpoint", "magnitude": pruned / "checkpoint"}
    output = tmp_path_factory.mktemp("results") / "decode.json"
    found = benchmark(root / "source", recipes, SETTINGS, output, fingerprints={"dense": "d", "armor": "a"})
    assert BenchmarkRecord.read(output) == found
    return found


def phases_of(by_batch):
    """Every quantity of a record by batch size and phase, in order of batch sizes."""
    assert list(by_batch) == ["1", "3"]
    return [runs for phases in by_batch.values() for runs in (phases.prefill, phases.decode)]


@pytest.mark.parametrize("recipe, core", [("armor", False), ("magnitude", False), ("armor", True)])
def test_a_speedup_is_over_the_dense_model_round_by_round(result, recipe, core):
    side = result.recipes[recipe].core if core else result.recipes[recipe]
    rows = (phases_of(each) for each in (side.speedup, side.tokens_per_second, result.dense.tokens_per_second))
    for ratio, own, dense in zip(*rows, strict=True):
        assert ratio.runs == pytest.approx([a / b for a, b in zip(own.runs, dense.runs, strict=True)])
        assert len(own.runs) == SETTINGS.repeats
    assert side.theoretical_speedup == result.dense.bytes_per_token / side.bytes_per_token


def turns_of(folders, settings, output):
    """Whose turn it was, prompt by prompt, with whether its core was alone; and the record of a benchmark."""
    names = {str(folder): name for name, folder in folders.items()}
    own: list[tuple[str, bool]] = []
    seen = []

    def note(module, args):
        if isinstance(module, PreTrainedModel) and module.base_model is not module:
            linear = module.model.layers[0].mlp.down_proj
            alone = isinstance(linear, ArmorLinear) and linear.left is None
            own[:] = [(names[module.name_or_path], alone and names[module.name_or_path] != "magnitude")]
        if isinstance(module, nn.Embedding) and args[0].shape[1] == settings.prompt_tokens:
            seen.extend(own)

    hook = register_module_forward_pre_hook(note)
    try:
        dense, *others = folders
        asked = settings.model_copy(update={"prompts": []})
        return seen, benchmark(folders[dense], {name: folders[name] for name in others}, asked, output)
    finally:
        hook.remove()


@pytest.fixture
def folders(root, pruned):
    return {"dense": root / "source", "armor": root / "checkpoint", "magnitude": pruned / "checkpoint"}


def test_all_models_take_turns_in_an_order_that_alternates(folders, tmp_path):
    seen, _ = turns_of(folders, SETTINGS, tmp_path / "decode.json")
    turns = [("dense", False), ("armor", False), ("magnitude", False), ("armor", True)]
    assert seen == turns * 2 + turns * 2 + turns[::-1] * 2 + turns * 2  # two batch sizes; the first turns warm up


def test_recipes_that_do_not_fit_together_take_turns_with_the_dense_model_alone(folders, tmp_path, monkeypatch):
    host_of(monkeypatch, 1)
    seen, found = turns_of(folders, SETTINGS, tmp_path / "decode.json")
    first, second = [("dense", False), ("armor", False), ("armor", True)], [("dense", False), ("magnitude", False)]
    assert seen == [turn for own in (first, second) for turn in own * 4 + own[::-1] * 2 + own * 2]
    assert found.turns == (("armor",), ("magnitude",))
    assert [len(side.speedup["1"].decode.runs) for side in found.recipes.values()] == [SETTINGS.repeats] * 2


def test_a_token_reads_every_weight_but_a_table_that_is_no_head(root):
    for folder in (root / "source", root / "checkpoint"):
        tensors = load_file(folder / "model.safetensors")
        stored = sum(t.numel() * t.element_size() for t in tensors.values())
        assert bytes_per_token(folder, load_model(folder)) == stored - tensors["model.embed_tokens.weight"].nbytes


def test_the_bytes_of_the_core_are_those_of_a_model_pruned_to_its_pattern(result):
    armor, pruned = result.recipes["armor"], result.recipes["magnitude"]
    assert pruned.core is None
    assert armor.core.bytes_per_token == pruned.bytes_per_token < armor.bytes_per_token
    assert armor.core.theoretical_speedup == pruned.theoretical_speedup
    assert armor.core.bits_per_weight == pytest.approx(pruned.bits_per_weight)


def test_the_samples_are_what_each_model_finds_the_most_likely_token_after_token(result, root, pruned):
    tokenizer = load_tokenizer(root / "source")
    folders = {"dense": root / "source", "armor": root / "checkpoint", "magnitude": pruned / "checkpoint"}
    models = {name: load_model(folder) for name, folder in folders.items()}
    assert [sample.prompt for sample in result.samples] == SETTINGS.prompts
    for sample in result.samples:
        assert sample.texts.keys() == models.keys()
        for name, model in models.items():
            tokens = start = tokenizer(sample.prompt, return_tensors="pt").input_ids
            for _ in range(SETTINGS.new_tokens):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
            assert model.config.eos_token_id not in tokens
            assert sample.texts[name] == tokenizer.decode(tokens[0, start.shape[1] :])


def test_sizes_are_those_of_the_files_and_bits_those_of_the_record(result, root, folder, checkpoint):
    for side, place in ((result.dense, root / "source"), (result.recipes["armor"], root / "checkpoint")):
        assert side.bytes_on_disk == (place / "model.safetensors").stat().st_size
    bits = json.loads((root / "checkpoint.json").read_text())["bits_per_weight"]
    assert (result.dense.bits_per_weight, result.recipes["armor"].bits_per_weight) == (32, bits)
    assert bytes_on_disk(folder)[1] == 16
    assert bytes_on_disk(checkpoint)[1] is None and core_on_disk(checkpoint)[1] is None  # it has no record beside it


def test_a_loaded_model_holds_its_weights(tmp_path):
    """Their bytes and not those of libraries."""
    size = {"vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 1024, "tie_word_embeddings": True}
    folder = tiny_model(tmp_path / "a folder", layers=4, **size)
    weights = (folder / "model.safetensors").stat().st_size
    found = measure_loading(folder, BenchmarkSettings(batch_sizes=[1], prompt_tokens=4, prompts=[]))
    assert 0.7 * weights < found.resident_bytes < 1.2 * weights + 20e6 and found.peak_bytes >= found.resident_bytes


def test_the_dense_model_alone_and_without_prompts_no_tokenizer(tmp_path):
    folder = tiny_model(tmp_path / "model", layers=1)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    settings = SETTINGS.model_copy(update={"repeats": 1, "prompts": []})
    result = benchmark(folder, {}, settings, tmp_path / "decode.json")
    assert (result.recipes, result.samples, result.turns) == ({}, (), ())
    speed = result.dense.tokens_per_second["1"].decode
    assert speed.quartiles == (speed.median, speed.median) and len(speed.runs) == 1


def test_an_end_of_text_does_not_end_decoding(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # every greedy choice would be the end of the text
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.eos_token_id] = model.model.norm.weight
    assert generation_speed(model, torch.tensor([[5, 6]]), 8)["decode"] > 0


def test_what_cannot_be_timed_is_one_line(root, folder, tmp_path):
    too_large = NoRoom(lambda name, found: name == "embedding" and len(found) == 4)
    said = f"{root / 'source'}: out of memory on cpu with batches of up to 4 sequences; lower batch_sizes"
    with too_large, pytest.raises(ArmorError, match=said):
        benchmark(root / "source", {}, BenchmarkSettings(prompts=[]), tmp_path / "decode.json")
    assert not (tmp_path / "decode.json").exists()
    with pytest.raises(ArmorError, match="checkpoint: dense is what the dense model is called here; rename"):
        benchmark(root / "source", {"dense": root / "checkpoint"}, SETTINGS, tmp_path / "decode.json")
    with pytest.raises(ArmorError, match=str(tmp_path)):
        benchmark(folder, {"none": tmp_path}, SETTINGS, tmp_path / "decode.json")


def test_speed_counts_the_tokens_of_all_sequences(folder, monkeypatch):
    marks = iter(range(100))
    # The prompt at 0, tokens at 1, 4, 9, 16.
    monkeypatch.setattr("armor.benchmark.speed.mark", lambda _: float(next(marks) ** 2))
    prompt = torch.ones(3, 5, dtype=torch.int64)
    assert generation_speed(load_model(folder), prompt, 4) == {"prefill": 3 * 5 / 1, "decode": 3 * 3 / 15}
