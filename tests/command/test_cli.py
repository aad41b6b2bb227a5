"""The command line: one line and exit code 1 for what a user can get wrong, before any work starts."""

from __future__ import annotations

import json

import pytest

from tests.forks import armor


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "absent.yaml"], "absent.yaml: No such file or directory; expected a YAML or JSON file"),
        (["check", "binary"], "binary: not UTF-8 text (invalid start byte at byte 0)"),
        (["check", "broken"], "broken: not valid YAML: "),
        (["fetch", "--settings", "{folder: absent}", "--output", "source.json"], "absent: no such folder"),
        (["inspect", "--source", ".", "--output", "binary/model.json"], "binary is not a folder that you may write to"),
        (["inspect", "--source", ".", "--output", "."], ".: is a folder; expected the name of a file to write"),
        (["verify", "absent"], "absent: holds no config.json; expected the folder of a checkpoint"),
        (["export", ".", "--output", "binary"], "binary: is there already; expected the name of a folder that is new"),
        (
            "factorize --source s --topology m --layer 0 --output f.safetensors --calibration unfinished.json".split(),
            "unfinished.json: no such file",
        ),
        (["summary", "."], "summary.json: no such file; run the stage that writes it first"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, arguments, said):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "broken").write_text("models: [")
    done = armor(*arguments, folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("armor: error: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "broken"]


def test_debug_shows_the_traceback(tmp_path):
    done = armor("--debug", "check", "absent.yaml", folder=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_verify_prints_a_table_or_json_and_export_what_it_wrote(root):
    done = armor("verify", "checkpoint", "--against", "source", folder=root)
    assert done.returncode == 0 and done.stdout.startswith("checkpoint: sound\n") and "down_proj" in done.stdout
    done = armor("verify", "checkpoint", "--json", folder=root)
    assert json.loads(done.stdout)["compressed_count"] == 14
    done = armor(*"export checkpoint --output dense --dtype float16".split(), folder=root)
    assert done.returncode == 0 and done.stdout.startswith("dense: 21 tensors, 14 multiplied out, "), done.stderr


CONFIG = """
models: {tiny: {folder: model}}
calibrations: {words: {text: {files: [words.txt]}}}
recipes: {armor: {}}
evaluations: {words: {text: {files: [words.txt]}}}
"""


def test_check_counts_what_the_files_ask_for_together(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "one.yaml").write_text(CONFIG)
    (tmp_path / "two.yaml").write_text("recipes: {nowag: {method: nowag}}\nbenchmarks: {decode: {}}")
    said = armor("check", "one.yaml", folder=tmp_path).stdout
    assert said == "one.yaml: 1 pair of model and recipe, 1 evaluation, 0 benchmarks\n"
    said = armor("check", "one.yaml", "two.yaml", folder=tmp_path).stdout
    assert said == "one.yaml two.yaml: 2 pairs of model and recipe, 2 evaluations, 2 benchmarks\n"


def test_check_names_every_path_at_which_there_is_nothing(tmp_path):
    mixed = CONFIG.replace("{files: [words.txt]}", "{mixture: [{dataset: c4}, {files: [more.txt]}]}", 1)
    (tmp_path / "one.yaml").write_text(mixed)
    done = armor("check", "one.yaml", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "armor: error: one.yaml: models.tiny.folder: model: no such folder",
        "armor: error: one.yaml: calibrations.words.text.mixture.1.files.0: more.txt: no such file",
        "armor: error: one.yaml: evaluations.words.text.files.0: words.txt: no such file",
    ]
