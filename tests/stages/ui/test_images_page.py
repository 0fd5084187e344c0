"""Pictures in the pages: small in lists, where they stand in a prompt, whole on a page of their own, and harmless."""

import html
import io
import re
import shutil
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from prefcache.pipeline.images import decode
from tests.helpers.chromium import CHROMIUM
from tests.helpers.illustrated import encode, id_of, illustrate, image_row
from tests.helpers.pages import serve
from tests.helpers.vision_models import picture
from tests.helpers.visits import DESK, PHONE, check_accessibility, fits, visit

BIG, TALL, BROKEN = (encode(picture(*size)) for size in ((640, 480), (40, 200), (31, 32)))
SEVERAL = [encode(picture(20, 20, seed)) for seed in range(5)]


@pytest.fixture(scope="module")
def site(trained_once, tmp_path_factory):
    """A trained experiment whose first prompts have one picture, two and five, and a late one a broken one."""
    folder = Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("illustrated") / "it"))
    pictures = {1: [BIG], 2: [BIG, TALL], 4: SEVERAL, 58: [BROKEN]}
    illustrate(folder / "runs/tiny/prepared", pictures, broken=[BROKEN])
    with serve(folder) as site:
        yield site


def of(encoded: bytes) -> str:
    return id_of(decode(encoded)).hex()


def example(site, encoded: bytes) -> str:
    """The address of the last example with a picture."""
    page = site.get("/pairs", [("where", f"list_contains(images, '{of(encoded)}')"), ("wait", "1")])
    return re.findall(r'href="(/pairs/[0-9a-f]{16})"', page.text)[-1]


def fetch(site, path: str) -> tuple[str, bytes]:
    with urlopen(Request(f"http://{site.host}{path}", headers={"cookie": site.cookie})) as answer:
        return answer.headers["content-type"], answer.read()


@pytest.mark.parametrize(("name", "size"), [("thumbnail", (240, 180)), ("whole", (640, 480))])
def test_a_picture_is_sent_as_a_jpeg_of_its_own_proportions(site, name, size):
    kind, data = fetch(site, f"/images/{of(BIG)}/{name}")
    with Image.open(io.BytesIO(data)) as image:
        assert (kind, image.format, image.size) == ("image/jpeg", "JPEG", size)


def test_pictures_are_behind_the_token(site):
    for name in ("", "/thumbnail", "/whole"):
        assert site.get(f"/images/{of(BIG)}{name}", cookie=None).status == 403


@pytest.mark.parametrize("image", ["nothing", "00" * 16, "..%2F..%2Fetc%2Fpasswd"])
def test_a_picture_that_no_prompt_has_is_not_found(site, image):
    for name in ("", "/thumbnail", "/whole"):
        assert site.get(f"/images/{image}{name}").status == 404


def test_a_prompt_shows_its_pictures_where_their_tags_stand(site):
    page = site.get(example(site, TALL)).text
    prompt = re.search(r'<div class="shown prompt".*?</div>', page, re.DOTALL)[0]
    pieces = re.findall(r'href="/images/(\w+)"|alt="(\[image[^"]*)"|<a|</a>([^<]+)<', prompt)
    tags = [decode(each).tag for each in (BIG, TALL)]
    assert [part for piece in pieces for part in piece if part][:4] == [of(BIG), tags[0], of(TALL), tags[1]]
    # The text follows the pictures, without their tags.
    assert "why" in prompt.rpartition("</a>")[2] and tags[0] not in html.unescape(re.sub(r"<[^>]*>", "", prompt))


def test_a_list_shows_the_first_pictures_of_a_prompt_and_how_many_more_there_are(site):
    page = site.get("/pairs", [("n_images.min", "5")]).text
    (row,) = re.findall(r'<th scope="row".*?</th>', page, re.DOTALL)
    assert row.count("<img") == 3 and "and 2 more images" in row
    assert site.get("/pairs", [("n_images.min", "1"), ("n_images.max", "2")]).text.count('scope="row"') == 3


def test_pages_say_how_many_tokens_stand_for_a_picture(site):
    n = image_row(decode(BIG))["n_tokens"]
    assert f">{n}, which stand for it in a prompt<" in site.get(f"/images/{of(BIG)}").text
    page = html.unescape(site.get(example(site, TALL)).text)  # its prompt has two pictures
    assert f"2; {2 * n} of the prompt's tokens stand for them" in page


def test_a_picture_that_no_longer_decodes_is_its_tag(site):
    assert site.get(f"/images/{of(BROKEN)}/thumbnail").status == 404
    page = site.get(f"/images/{of(BROKEN)}")
    assert page.status == 200 and "cannot be decoded" in page.text and "<img" not in page.text
    assert "<script>alert" not in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the pages were not looked at")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_pages_with_pictures_fit_and_a_picture_opens_by_keyboard(browser, site, size, scheme):
    with visit(browser, site, size, color_scheme=scheme) as page:
        page.goto(f"http://{site.host}/pairs?n_images.min=5")
        page.wait_for_selector("tbody th img")
        assert fits(page)
        check_accessibility(page)
        page.goto(f"http://{site.host}{example(site, TALL)}")
        # decode() also waits for pictures that are loaded lazily; the page's load event does not.
        sizes = page.evaluate(
            "Promise.all([...document.querySelectorAll('.prompt img')]"
            ".map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))"
        )
        assert sizes == [[240, 180], [40, 200]]
        assert fits(page)
        check_accessibility(page)
        page.locator(".prompt a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/images/{of(BIG)}")
        assert page.locator("h1").inner_text() == decode(BIG).tag
        assert page.evaluate("document.querySelector('img').naturalWidth") == 640
        assert fits(page)
        check_accessibility(page)
