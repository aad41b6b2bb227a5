"""The report in a real browser: nothing goes wrong or over a network, it sorts, anyone can read it."""

from __future__ import annotations

import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from armor.report import build, compare
from tests.report.sample import KL, PERPLEXITY, plan, trained, write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")
PHONE, DESK = 380, 1280
PAGES = {"report": "results/report/index.html", "comparison": "comparison/index.html"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with all that a report can show, compared with itself too."""
    folder = tmp_path_factory.mktemp("browser")
    wanted = plan(evaluations=["wikipedia", "c4"], tasks={"reading": ["last_word", "continuation"]}, serving=["serve"])
    wanted = trained(trained(wanted, "armor", "refine", "tune"), "nowag", "refine")
    results = write_results(folder / "results", wanted, 6)
    build(results, wanted, results / "report")
    compare(results, results, folder / "comparison")
    return folder


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        # --no-sandbox: it refuses to run as root otherwise; the others: it would look up hosts by itself.
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet, timeout=0)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, folder):
    """Opens the report, or the comparison, offline; what went wrong and what was requested is noted on the page."""
    contexts = []

    def visit(width=DESK, theme="light", file="report"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, offline=True)
        context.set_default_timeout(0)  # a loaded machine is no error
        contexts.append(context)
        page = context.new_page()
        page.wrong, page.requested = [], []
        page.on("console", lambda message: message.type in ("error", "warning") and page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto((folder / PAGES[file]).as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("file", PAGES)
def test_nothing_goes_wrong_and_nothing_is_asked_of_a_network(visit, file):
    page = visit(file=file)
    page.wait_for_load_state("networkidle")
    assert page.wrong == []
    assert [url for url in page.requested if not url.startswith("data:")] == [page.url]


def test_a_heading_sorts_by_value_upwards_then_downwards_then_back_with_gaps_last(visit):
    page = visit()
    heading = page.locator("table.sortable thead th", has_text="KL")
    rising = sorted(KL, key=KL.get)
    for state, expected in (
        ("ascending", [*rising, "dense"]),
        ("descending", [*rising[::-1], "dense"]),
        (None, list(PERPLEXITY)),
    ):
        heading.get_by_role("button").press("Enter")
        assert heading.get_attribute("aria-sort") == state
        assert page.locator("table.sortable tbody th").all_inner_texts() == expected


@pytest.mark.parametrize("file", PAGES)
def test_a_phone_in_the_dark_shows_what_anyone_can_read(visit, file):
    page = visit(PHONE, "dark", file)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    found = Axe().run(page).response["violations"]
    grave = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in grave] == []
