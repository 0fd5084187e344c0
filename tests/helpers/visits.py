"""Visit pages with a real browser, which reports whatever goes wrong in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.pages import Site

DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def visit(browser: Any, site: Site, size: dict[str, int], **options: Any) -> Iterator[Any]:
    """Enter with the printed address; at the end nothing may have been reported, nor asked of another server."""
    context = browser.new_context(viewport=size, **options)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if f"//{site.host}/" in request.url else problems.append(request.url))
    page.set_default_timeout(60_000)  # of a machine that is busy with other tests
    page.goto(site.address)
    assert site.token not in page.url
    yield page
    assert problems == []
    context.close()


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def check_accessibility(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    serious = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == [], page.url
