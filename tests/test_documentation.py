"""What the pages tell people to type and to open exists: links, files, commands with their options, configurations."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml

from armor.command.cli import app
from armor.config.measures import EvaluationSettings
from armor.config.reading import parse_settings
from armor.config.recipes import Recipe
from armor.config.run import Config
from armor.core.version import __version__
from armor.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), REPOSITORY / "config/README.md", *(REPOSITORY / "docs").rglob("*.md")],
    key=str,
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("armor", "benchmarks", "config", "docs", "envs", "profiles", "tests", "workflow", ".github")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page, *languages):
    """The blocks of code of a page in one of these languages."""
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page):
    lost = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if re.match("[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(f"{target}#{anchor}")
    assert lost == []


@every_page
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"`([\w./+-]+/[\w./+-]*)`", prose(page))
    ours = [path for path in named if path.partition("/")[0] in FOLDERS and not re.search("[A-Z]{4}", path)]
    at = {REPOSITORY, REPOSITORY / "config"}
    assert [path for path in ours if not any((folder / path).exists() for folder in at)] == []


def commands(page):
    """Every command of a page, as words: those of shell blocks, and of code within lines that starts like one."""
    text = "\n".join(blocks(page, "sh", "bash"))
    text += "\n" + "\n".join(re.findall(r"^    (\S.*(?:(?<=\\)\n.*)*)", prose(page), re.MULTILINE))
    text += "\n" + "\n".join(re.findall(r"`((?:armor|snakemake|make|python -m) [^`]+)`", prose(page)))
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.commenters, lexer.whitespace_split = "#", True
        words = []
        for word in [*lexer, ";"]:
            if word in (";", "&", "&&", "|", "||", "do"):
                while words and re.match(r"\w+=", words[0]):  # variables of the environment
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def options(words):
    return [word.partition("=")[0] for word in words if re.match("--?[a-z]", word)]


def wrong_armor(words):
    known = typer.main.get_command(app)
    names = [word for word in words[1:2] if not word.startswith("-")]
    if not names or names[0].isupper():  # `armor --help`, `armor STAGE`
        return [option for option in options(words) if option not in ("--help", "--debug", "--settings")]
    if names[0] not in known.commands:
        return names
    has = {option for parameter in known.commands[names[0]].params for option in parameter.opts} | {"--help"}
    return [option for option in options(words[2:]) if option not in has]


def wrong_snakemake(words):
    from snakemake.cli import get_argument_parser

    has = {option for action in get_argument_parser()._actions for option in action.option_strings}
    return [option for option in options(words[1:]) if option not in has]


def wrong_make(words):
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    return [word for word in words[1:] if word not in targets and "=" not in word]


def wrong_python(words):
    if words[1:2] != ["-m"] or not words[2].startswith("benchmarks."):
        return []
    file = REPOSITORY / (words[2].replace(".", "/") + ".py")
    if not file.is_file():
        return [words[2]]
    return [option for option in options(words[3:]) if f'"{option}"' not in file.read_text()]


WRONG = {"armor": wrong_armor, "snakemake": wrong_snakemake, "make": wrong_make, "python": wrong_python}


@every_page
def test_every_command_and_option_exists(page):
    found = [words for words in commands(page) if words[0] in WRONG]
    wrong = {" ".join(words): mistakes for words in found if (mistakes := WRONG[words[0]](words))}
    assert wrong == {}


@every_page
def test_configurations_in_pages_are_valid(page):
    for text in blocks(page, "yaml"):
        value = yaml.safe_load(text)
        if "models" in value:
            parse_settings(Config, value, page.name)
        elif "evaluations" in value:
            for settings in value["evaluations"].values():
                parse_settings(EvaluationSettings, settings, page.name)


@every_page
def test_python_in_pages_compiles(page):
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


def test_the_method_in_contributing_is_short_and_works(tmp_path, monkeypatch):
    (text,) = [text for text in blocks(REPOSITORY / "CONTRIBUTING.md", "python") if "@method(" in text]
    assert len(text.splitlines()) <= 40
    file = tmp_path / "random.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("armor.methods.random", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where a method's idea is read from
    try:
        spec.loader.exec_module(module)
        found = METHODS["random"]
        made = found.run(torch.randn(6, 16), SimpleNamespace(importance=torch.ones(16)), Recipe(), seed=1)
    finally:
        METHODS.pop("random", None)
    assert found.idea.startswith("Random entries of every group stay.")
    assert made.mask.view(6, 4, 4).sum(-1).eq(2).all()


def test_every_page_is_in_the_site():
    navigation, docs = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[2], REPOSITORY / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in navigation] == []


def test_the_changelog_is_a_list_by_version_and_the_last_one_is_the_packages():
    heads = re.findall(r"^(##+) (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [text for level, text in heads if level == "##" and text != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", text) for text in released)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert released[0] == f"{__version__} - {citation['date-released']}" and citation["version"] == __version__
