"""A visit with a real browser: filter, drag, open, colour, save, with a mouse and by keyboard alone, on a desk and on a phone."""

import pyarrow.parquet as pq
import pytest

from tests.helpers.chromium import CHROMIUM
from tests.helpers.pages import serve
from tests.helpers.visits import DESK, PHONE, check_accessibility, fits, visit

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the pages were not looked at")


@pytest.fixture(scope="module")
def site(trained_once):
    with serve(trained_once) as site:
        yield site


def wait_for_counts(page) -> int:
    """Wait until the page has its parts; return the count that it shows."""
    page.wait_for_selector("#count b", state="attached")
    page.wait_for_selector("svg.histogram", state="attached")
    return int(page.locator("#count b").inner_text().replace(",", ""))


def test_a_visit_with_a_mouse(browser, site, trained_once):
    with visit(browser, site, DESK) as page:
        assert wait_for_counts(page) == 60
        # Drag from the middle of the margins to the left edge: the pairs whose margin is below it.
        svg = page.locator("svg[data-key=margin]")
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 25)
        page.mouse.move(box["x"] - 5, box["y"] + 30)
        with page.expect_navigation():
            page.mouse.up()
        most = float(page.locator("input[name='margin.max']").input_value())
        assert page.locator("input[name='margin.min']").input_value() == ""
        start, end = (
            float(page.locator("svg[data-key=margin]").get_attribute(f"data-{side}")) for side in ("start", "end")
        )
        assert most == pytest.approx((start + end) / 2, abs=(end - start) / 100)
        n = wait_for_counts(page)
        assert 0 < n < 60
        # Sort by the margin, largest first.
        page.get_by_role("link", name="reference margin", exact=True).click()
        margins = [float(text) for text in page.locator("tbody td[data-title='reference margin']").all_inner_texts()]
        assert margins == sorted(margins, reverse=True) and margins[0] <= most + 0.005
        wait_for_counts(page)
        # Tick two, clear the filter, tick one more on another page: all three are saved.
        boxes = page.locator("input[name=id]")
        chosen = [boxes.nth(i).get_attribute("value") for i in (0, 1)]
        for i in (0, 1):
            boxes.nth(i).check()
        page.get_by_role("link", name="Clear").click()
        page.get_by_role("link", name="Next page").click()
        page.get_by_text("(2)", exact=True).wait_for()
        page.locator("input[name=id]").last.check()
        chosen.append(page.locator("input[name=id]").last.get_attribute("value"))
        page.get_by_label("as", exact=True).fill("by-mouse")
        page.get_by_role("button", name="Save").click()
        assert page.get_by_role("status").inner_text() == "saved"
        saved = pq.read_table(trained_once / "runs/tiny/selections/by-mouse.parquet")["example_id"].to_pylist()
        assert sorted(saved) == sorted(chosen)
        page.get_by_role("link", name="Pairs").click()
        wait_for_counts(page)
        assert page.locator("#n-ticked").inner_text() == ""


def test_a_click_on_a_histogram_removes_its_range(browser, site):
    with visit(browser, site, DESK) as page:
        page.goto(f"http://{site.host}/pairs?margin.max=-50")
        assert wait_for_counts(page) < 60
        with page.expect_navigation():
            page.locator("svg[data-key=margin]").click()
        assert wait_for_counts(page) == 60


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_visit_by_keyboard_alone(browser, site, trained_once, size):
    def reach(selector: str) -> None:
        """Press Tab until the element has the focus."""
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    name = f"by-keys-{size['width']}"
    with visit(browser, site, size) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("Enter")
        if size is PHONE:
            reach("summary")
            page.keyboard.press("Enter")
        reach("input[name=text]")
        page.keyboard.type("CAT")
        reach("input[name='margin.max']")
        page.keyboard.type("1000")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        n = wait_for_counts(page)
        page.wait_for_selector("#rows .pages")
        assert page.locator("input[name=id]").count() == n
        assert 0 < n < 60
        reach("input[name=id]")
        page.keyboard.press("Space")
        reach("input[name=which]")
        page.keyboard.press("ArrowDown")  # all that the filter leaves
        reach("input[name=name]")
        page.keyboard.type(name)
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert len(pq.read_table(trained_once / f"runs/tiny/selections/{name}.parquet")) == n
        page.goto(f"http://{site.host}/pairs")
        reach("tbody th a")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert page.locator("h1").inner_text() in page.url


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(DESK, "light", id="desk-light"),
        pytest.param(PHONE, "dark", id="phone-dark"),
        pytest.param(DESK, "dark", id="desk-dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.slow),
    ],
)
def test_every_page_fits_and_can_be_used_by_everybody(browser, site, size, scheme):
    with visit(browser, site, size, color_scheme=scheme) as page:
        wait_for_counts(page)
        example = page.locator("tbody th a").first.get_attribute("href")
        for path in (
            "/pairs",
            "/pairs?text=cat",
            "/pairs?margin.max=-50&sort=trained.margin",
            "/selections",
            example,
            f"{example}?run=trained",
        ):
            page.goto(f"http://{site.host}{path}")
            page.wait_for_load_state("networkidle")
            if size is PHONE and page.locator("summary").count():
                page.locator("summary").first.click()
            assert fits(page), path
            check_accessibility(page)


def test_without_script_it_still_filters_and_sorts(browser, site):
    with visit(browser, site, DESK, java_script_enabled=False) as page:
        page.locator("input[name='margin.max']").fill("-50")
        page.get_by_role("button", name="Apply").click()
        assert page.locator("input[name='margin.max']").input_value() == "-50"
        assert 0 < page.locator("input[name=id]").count() <= 50
        page.locator("input[name=text]").fill("cat")
        page.get_by_role("button", name="Apply").click()
        page.get_by_role("link", name="Wait for the list").click()
        assert page.locator("input[name=id]").count() or page.get_by_text("No pairs meet these conditions").count()
