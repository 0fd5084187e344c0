"""Only who has the token sees a page, under the server's own name, and only its own pages change anything."""

import pytest

from tests.helpers.pages import serve


@pytest.fixture(scope="module")
def site(scored_once):
    with serve(scored_once) as site:
        yield site


PATHS = ["/", "/pairs", "/pairs/count", "/pairs/histograms", "/selections", "/static/ui.js", "/no-such-page"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cookie", [None, "", "prefcache-1=x", "token=x", 'prefcache="', "é"])
def test_without_the_token_there_is_nothing_to_see(site, path, cookie):
    answer = site.get(path, cookie=cookie)
    assert (answer.status, answer.text[:26]) == (403, "The token is missing or wr")


def test_the_token_of_the_address_moves_into_a_cookie(site):
    answer = site.get("/", [("token", site.token)], cookie=None)
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(site.cookie) and "HttpOnly" in cookie and "SameSite=strict" in cookie
    answer = site.get("/pairs", [("text", "a&b"), ("token", site.token)], cookie=None)
    assert answer.headers["location"] == "/pairs?text=a%26b"
    assert site.get("/pairs", [("token", site.token[:-1])], cookie=None).status == 403


def test_a_redirection_never_leads_to_another_site(site):
    for path in ("//evil.example/x", "/\\evil.example", "///evil.example"):
        location = site.get(path, [("token", site.token)], cookie=None).headers.get("location", "/")
        assert location.startswith("/") and not location.startswith(("//", "/\\"))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "localhost", "localhost:1", "localhost:{port}.evil.example", ""]
)
def test_under_another_name_there_is_nothing_to_see(site, host):
    # A page of evil.example whose name points to 127.0.0.1 would come with this host, and with a cookie if it guessed one.
    assert site.get("/pairs", host=host.format(port=site.host.rpartition(":")[2])).status == 403


def test_the_names_of_this_machine_are_its_own(site):
    port = site.host.rpartition(":")[2]
    assert site.get("/pairs", host=f"localhost:{port}").status == 200


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "https://{host}", "http://{host}.evil.example", "http://localhost:1"],
)
def test_another_sites_page_cannot_save_anything(site, scored_once, origin):
    sent = origin and origin.format(host=site.host)
    form = [("name", "theirs"), ("which", "filter"), ("use", "only")]
    assert site.post("/selections", form, origin=sent).status == 403
    assert not list(scored_once.glob("**/theirs*"))


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_do_nothing(site, method):
    assert site.ask(method, "/selections", None, {"origin": f"http://{site.host}"}).status in (400, 405)


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_kept_from_other_pages_and_runs_only_its_own_script(site, path):
    for answer in (site.get(path), site.get(path, cookie=None)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "style-src 'self';" in policy
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


@pytest.mark.parametrize("name", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "ui.py", "", "/etc/passwd"])
def test_no_other_file_is_sent(site, name):
    answer = site.get(f"/static/{name}")
    assert answer.status == 404 and "import" not in answer.text


def test_a_form_that_is_too_large_is_refused(site):
    answer = site.post("/selections", [("name", "a" * (1 << 21))])
    assert answer.status == 400 and "too large" in answer.text


def test_the_token_is_another_each_time(site, scored_once):
    with serve(scored_once) as other:
        assert other.token != site.token and len(other.token) >= 32
        assert other.get("/pairs", cookie=site.cookie).status == 403
