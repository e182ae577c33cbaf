"""The report in headless Chromium: light and dark, on a desk and on a phone, without a request and without a script.

Debian's Chromium (`apt-get install chromium`) is driven by playwright; nothing else is downloaded.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from batchinfer.report.comparison import comparison_page
from batchinfer.report.page import report_page
from tests.reports import reported

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Chromium would ask its maker for updates and host names.
ALONE = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
DESK, PHONE = (1280, 900), (390, 844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything a page can have, a hostile cause and a long Korean one among it."""
    directory = tmp_path_factory.mktemp("report")
    report = reported(directory, price=3.6, hostile="<script>document.title='forged'</script>" + "가나다" * 60)
    file = directory / "report.html"
    file.write_text(report_page(report), encoding="utf-8")
    (directory / "compared.html").write_text(comparison_page(report, report), encoding="utf-8")
    return file


def opened(
    browser: Browser, file: Path, size: tuple[int, int] = DESK, scheme: Literal["light", "dark"] = "light"
) -> tuple[Page, list[str]]:
    """The page as shown, and what went wrong or was asked for while it loaded."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    noticed: list[str] = []
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.on("request", lambda request: noticed.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    if shots := os.environ.get("BATCHINFER_SCREENSHOTS"):
        page.screenshot(path=Path(shots) / f"{file.stem}-{size[0]}-{scheme}.png", full_page=True)
    return page, noticed


def luminance(page: Page, selector: str, style: str) -> float:
    """Of an element's colour, 0 black to 255 white."""
    colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{style}")
    red, green, blue = (float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", ["report.html", "compared.html"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_is_requested_and_nothing_sticks_out(
    browser: Browser, page_file: Path, name: str, size: tuple[int, int]
) -> None:
    page, noticed = opened(browser, page_file.with_name(name), size)
    assert noticed == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert "forged" not in page.title()
    page.close()


def test_charts_lanes_and_bars_have_a_size(browser: Browser, page_file: Path) -> None:
    """A path that is no path, or a width that is no number, is drawn as nothing without a word."""
    page, _ = opened(browser, page_file)
    for selector in (".plot svg path.stroke", ".track i.busy", ".stack i.busy", ".bars i"):
        boxes = [element.bounding_box() for element in page.locator(selector).all()]
        assert boxes, selector
        assert all(box is not None and box["width"] >= 1 for box in boxes), selector
    headings = page.locator("h2").all_inner_texts()
    assert {"Where device time went", "Replicas", "Lengths and ends", "Dead letters by cause", "Runs"} <= set(headings)
    # What is folded away opens without a script.
    folded = page.locator("details:not([open])").first
    folded.locator("summary").click()
    assert folded.page.locator("details[open]").count() >= 2
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(browser: Browser, page_file: Path, scheme: Literal["light", "dark"]) -> None:
    page, _ = opened(browser, page_file, PHONE, scheme)
    ground = luminance(page, "section", "backgroundColor")
    assert (ground > 200) == (scheme == "light")
    for selector in ("h1", "section h2", "section td", "section .soft"):
        assert abs(luminance(page, selector, "color") - ground) > 80, selector
    page.close()
