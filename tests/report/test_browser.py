"""The report in a real browser: nothing goes wrong or over a network, it sorts, it fits a phone, anyone can read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error, sync_playwright

from armor.report import build, compare
from tests.report.sample import KL, PERPLEXITY, plan, trained, write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")
FIGURES = 17
PHONE, DESK = 380, 1280
PAPER = 718  # A4 upright without Chromium's margins of a centimetre, in CSS pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with all that a report can show, compared with itself too; screenshots are written beside it."""
    folder = tmp_path_factory.mktemp("browser")
    wanted = plan(evaluations=["wikipedia", "c4"], tasks={"reading": ["last_word", "continuation"]}, serving=["serve"])
    wanted = trained(trained(wanted, "armor", "refine", "tune"), "nowag", "refine")
    wanted.config["recipes"]["keep"] = "a-long-name-" * 20  # wider than paper
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

    def visit(width=DESK, theme="light", file="results/report/index.html", script=True):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True, java_script_enabled=script
        )
        context.set_default_timeout(0)  # a loaded machine is no error
        contexts.append(context)
        page = context.new_page()
        page.wrong, page.requested = [], []
        page.on("console", lambda message: message.type in ("error", "warning") and page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto((folder / file).as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()


def column(page, heading):
    """The recipes and the texts of the main table's column `heading`, as they stand."""
    headings = page.locator("table.sortable thead th").all_inner_texts()
    place = [text.strip() for text in headings].index(heading)
    rows = page.locator("table.sortable tbody tr").all()
    return [(row.locator("th").inner_text(), row.locator("th, td").nth(place).inner_text()) for row in rows]


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
def test_nothing_goes_wrong_and_nothing_is_asked_of_a_network(visit, file):
    page = visit(file=file)
    page.wait_for_load_state("networkidle")
    assert page.wrong == []
    assert [url for url in page.requested if not url.startswith("data:")] == [page.url]


def test_a_heading_sorts_upwards_then_downwards_then_back_with_gaps_last(visit):
    page = visit()
    heading = page.locator("table.sortable thead th", has_text="KL")
    rising = sorted(KL, key=KL.get)
    for state, expected in (
        ("ascending", [*rising, "dense"]),
        ("descending", [*rising[::-1], "dense"]),
        (None, list(PERPLEXITY)),
    ):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == state
        assert [recipe for recipe, _ in column(page, "KL")] == expected
    assert dict(column(page, "KL"))["dense"] == "–"


def test_the_keyboard_sorts_too_and_one_column_at_a_time(visit):
    page = visit()
    buttons = page.locator("table.sortable thead").get_by_role("button")
    assert buttons.count() == page.locator("table.sortable thead th").count() == 11
    page.locator(".scroll").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert [recipe for recipe, _ in column(page, "Recipe")] == sorted(PERPLEXITY)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert [recipe for recipe, _ in column(page, "Perplexity")] == sorted(PERPLEXITY, key=PERPLEXITY.get)
    assert page.locator("[aria-sort]").all_inner_texts() == ["Perplexity"]


def test_numbers_sort_by_value_and_not_by_how_they_are_written(visit):
    page = visit()
    page.locator("table.sortable thead").get_by_role("button", name="Size").click()
    assert [text for _, text in column(page, "Size")] == ["176 MB", "176 MB", "176 MB", "213 MB", "273 MB"]
    page.locator("table.sortable thead").get_by_role("button", name="Factorize").click()
    assert [text.split()[1] for _, text in column(page, "Factorize")[:4]] == ["s", "s", "min", "min"]
    assert column(page, "Factorize")[3][0] == "armor" and column(page, "Factorize")[4][1] == "–"


def test_without_javascript_the_table_is_a_table(visit):
    page = visit(script=False)
    assert page.get_by_role("button").count() == 0
    assert dict(column(page, "Perplexity"))["armor"] == "30.96 ± 2.79"


def test_the_configuration_to_run_it_again_comes_out_of_the_page_itself(visit):
    page = visit()
    with page.expect_download() as download:
        page.get_by_role("link", name="config.yaml").click()
    page.get_by_text("The configuration", exact=True).click()
    shown = page.get_by_role("region", name="The configuration").inner_text()
    assert download.value.suggested_filename == "config.yaml"
    assert Path(download.value.path()).read_text() == shown and shown.startswith("models:")


def test_a_recipe_of_the_table_leads_to_what_made_it(visit):
    page = visit()
    rows = page.locator("table.sortable tbody th")
    assert {row.inner_text() for row in rows.all() if not row.get_by_role("link").count()} == {"dense"}
    page.locator("table.sortable").get_by_role("link", name="armor", exact=True).click()
    target = page.locator(":target")
    assert target.inner_text().startswith("armor: source ")
    assert target.evaluate("one => one.getBoundingClientRect().top < innerHeight")


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_figure_has_marks_and_a_text_alternative(visit, width):
    page = visit(width)
    charts = page.locator("figure svg")
    assert charts.count() == FIGURES
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["width"] > 250 and box["height"] > 80
        assert len(chart.get_attribute("aria-label")) > 30
        marks = chart.locator("[class*=mark-symbol], [class*=mark-line], [class*=mark-rect]").locator("path")
        drawn = marks.evaluate_all("all => all.map(one => one.getBoundingClientRect())")
        assert any(mark["width"] > 3 and mark["height"] > 1 for mark in drawn)
    named = page.get_by_role("img").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert len(set(named)) == FIGURES


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
def test_a_phone_need_not_scroll_sideways_but_within_a_table(visit, file):
    page = visit(PHONE, file=file)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    table = page.locator(".scroll").first
    assert table.evaluate("box => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX === 'auto'")


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_row_is_whole_pixels_high_so_that_its_line_is_one(visit, width, file):
    """A cell that stays while others scroll is rounded to pixels by itself."""
    rows = visit(width, file=file).locator("table.data tr")
    heights = rows.evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert heights and all(height % 1 == 0 for height in heights)


COLOURS = """all => all.map(one => ["color", "backgroundColor", "fill", "stroke", "borderTopColor"]
    .map(name => getComputedStyle(one)[name]))"""
CUT = """all => all.filter(one => {
    const box = one.getBoundingClientRect(), hidden = getComputedStyle(one).overflowX !== "visible";
    const right = Math.max(box.right, box.left + one.scrollWidth);
    return right > innerWidth + 0.5 || box.left < -0.5 || hidden && one.scrollWidth > one.clientWidth;
}).map(one => `${one.tagName} ${one.className}: ${one.textContent.slice(0, 40)}`)"""


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"])
def test_on_a_phone_the_names_that_stay_leave_room_for_values_and_nothing_shines_through(visit, file):
    page = visit(PHONE, file=file)
    tables = page.locator(".scroll").all()
    assert tables
    for table in tables:
        room = table.bounding_box()["width"]
        names = table.locator("th:first-child").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
        assert max(names) <= room / 2
        table.evaluate("box => box.scrollLeft = 80")
        first = table.locator("thead th:first-child")
        first.scroll_into_view_if_needed()
        assert first.evaluate(
            """cell => { const box = cell.getBoundingClientRect();
                         const top = document.elementFromPoint(box.right - 3, box.top + box.height / 2);
                         return cell === top || cell.contains(top); }"""
        )


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
def test_print_is_light_in_dark_mode_too(visit, file):
    light, dark = (visit(PAPER, theme, file) for theme in ("light", "dark"))
    assert dark.locator("main, main *").evaluate_all(COLOURS) != light.locator("main, main *").evaluate_all(COLOURS)
    for page in (light, dark):
        page.emulate_media(media="print")
    printed = dark.locator("html, html *").evaluate_all(COLOURS)
    assert printed == light.locator("html, html *").evaluate_all(COLOURS)
    assert (
        dark.locator(".card").first.evaluate("card => getComputedStyle(card).backgroundColor") == "rgb(255, 255, 255)"
    )


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
def test_print_cuts_nothing_off_and_unfolds_what_is_folded(visit, file, folder):
    page = visit(PAPER, file=file)
    everything = page.locator("main *:not(svg *)")
    assert everything.evaluate_all(CUT) != []  # on a screen tables scroll
    folded = page.locator("details > :not(summary)")
    shown = "all => all.map(one => one.checkVisibility({ contentVisibilityAuto: true }) && one.offsetHeight > 100)"
    assert not any(folded.evaluate_all(shown))
    page.emulate_media(media="print")
    assert everything.evaluate_all(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER
    assert folded.evaluate_all(shown) == [True] * (1 if "report" in file else 0)
    photograph(page, folder / f"{file.partition('/')[0]}-print.png")


def photograph(page, file):
    """A screenshot of the whole page; Chromium on a busy machine now and then says that it cannot, and can later."""
    for last in (False, False, True):
        try:
            page.screenshot(path=file, full_page=True)
            return
        except Error:
            if last:
                raise


@pytest.mark.parametrize("file", ["results/report/index.html", "comparison/index.html"], ids=["report", "comparison"])
@pytest.mark.parametrize(("width", "theme"), [(PHONE, "dark"), (DESK, "light")])
def test_axe_finds_nothing_serious(visit, folder, width, theme, file):
    page = visit(width, theme, file)
    photograph(page, folder / f"{file.partition('/')[0]}-{width}-{theme}.png")
    found = Axe().run(page).response["violations"]
    grave = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in grave] == []
