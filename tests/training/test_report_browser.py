"""The page of `moq report` in a browser."""

import re
import shutil
import subprocess

import pytest
from reported_runs import SECTIONS, deep_page, train_reported

from moq.report_command import report

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return report(train_reported(tmp_path_factory.mktemp("report"))[1])


@pytest.fixture(scope="module")
def deep():
    return deep_page()


def works(program: str) -> bool:
    """Whether a browser is there, and no stub of a package manager."""
    if shutil.which(program) is None:
        return False
    asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and "Chrom" in asked.stdout


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    program = next(filter(works, ("chromium", "chromium-browser", "google-chrome")), None)
    if program is None:
        pytest.skip("needs Chromium: sudo apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=shutil.which(program))
        yield found
        found.close()


def luminance(color: str) -> float:
    """Of a CSS colour, rgb(…), from 0 to 1, near enough to tell dark from light."""
    red, green, blue = map(float, re.findall(r"[\d.]+", color)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


OVERLAPS = """all => all.flatMap(labels => {
    const shown = [...labels.children].filter(one => one.offsetWidth > 0)
    return shown.slice(1).filter((one, i) =>
        one.getBoundingClientRect().left < shown[i].getBoundingClientRect().right)
}).map(one => one.textContent)"""


@pytest.mark.parametrize("width", [1280, 390, 340])
def test_labels_have_room_beside_each_other(browser, text, deep, tmp_path, width):
    for name, content in (("text", text), ("deep", deep)):
        file = tmp_path / f"{name}.html"
        file.write_text(content)
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(file.as_uri())
        assert page.locator(".plot .x").evaluate_all(OVERLAPS) == []
        cut = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).length"
        assert page.locator(".plot .y span").evaluate_all(cut) == 0
        charts = page.locator(".plot .x").count()
        assert page.locator(".plot .x span:visible").count() >= 2 * charts > 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_whole(browser, text, tmp_path, scheme, width):
    file = tmp_path / "report.html"
    file.write_text(text)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())

    assert asked == [file.as_uri()]
    assert told == []
    for name in SECTIONS:
        assert page.locator(f"#{name} h2").bounding_box()["height"] > 10, name
    boxes = page.locator("figure .plot, figure .bar svg").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.left, b.right, b.height])"
    )
    assert len(boxes) > 12
    for left, right, height in boxes:
        assert 0 <= left < right - 100 and right <= width and height >= 20
    shapes = page.locator("svg path, svg rect").evaluate_all(
        "all => all.filter(one => !one.closest('.legend')).map(one => "
        "[getComputedStyle(one).stroke, getComputedStyle(one).fill])"
    )
    assert all(("none", "none") != tuple(paint) for paint in shapes)
    # Nothing is wider than the window but tables, which scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    body = "getComputedStyle(document.body)"
    paper, ink = (luminance(page.evaluate(f"{body}.{key}")) for key in ("backgroundColor", "color"))
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 0.7

    picture = tmp_path / "report.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    page.close()


def test_charts_have_words_at_their_axes_and_under_the_pointer(browser, text, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(text)
    page = browser.new_page()
    page.goto(file.as_uri())
    chart = page.locator("#plan .plot").first
    ticks = chart.locator(".x span").all_inner_texts()
    assert ticks == ["0", "5", "10", "15", "20"]
    lefts = chart.locator(".x span").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert all(right < left for (_, right), (left, _) in zip(lefts, lefts[1:], strict=False))
    titles = page.locator("#bits rect title").evaluate_all("all => all.map(t => t.textContent)")
    assert any("model.layers.0: 16 bits, steps 0 to" in title for title in titles)
    page.locator("#plan summary").click()
    assert page.get_by_role("table", name="Step of arrival at the target width").is_visible()
    page.close()
