"""From what a record holds to a picture: every way to name or hold one gives the same, and what cannot be used says why."""

import base64
import contextlib
import http.server
import io
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from prefcache.pipeline.preparing import pictures
from prefcache.pipeline.preparing.example import Unusable
from prefcache.pipeline.preparing.pictures import PictureLoader, base_folder
from tests.helpers.vision_models import picture


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


ENCODED = encode(picture(6, 4))
TEXT = base64.b64encode(ENCODED).decode()


def refuse(value, base=None, **settings):
    with pytest.raises(Unusable) as caught:
        PictureLoader(**settings).load(value, base)
    return caught.value.reason, caught.value.detail


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder that is not the current one, with a picture."""
    (tmp_path / "data" / "pics").mkdir(parents=True)
    (tmp_path / "data" / "pics" / "a b.png").write_bytes(ENCODED)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


# -- values ----------------------------------------------------------------------------------------------------------


def test_every_way_to_hold_or_name_a_picture_gives_the_same(data):
    file = data / "pics" / "a b.png"
    for value in (
        "pics/a b.png",
        "../data/pics/a b.png",
        str(file),
        f"file://{file}",
        f"file://localhost{str(file).replace(' ', '%20')}",
        ENCODED,
        bytearray(ENCODED),
        TEXT,
        "\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)) + "\n",
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;charset=x;base64,{TEXT}",
        {"bytes": ENCODED, "path": None},
        {"bytes": ENCODED, "path": "no such file"},
        {"bytes": None, "path": "pics/a b.png"},
        {"bytes": TEXT, "path": None},  # as an export to JSON Lines writes them
        {"path": str(file)},
        {"url": f"data:image/png;base64,{TEXT}"},
        {"image_url": {"url": TEXT, "detail": "high"}},
    ):
        assert PictureLoader().load(value, data).encoded == ENCODED, value


def test_a_picture_of_any_format_is_known_in_base64():
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        encoded = encode(picture(9, 9), kind)
        assert PictureLoader().load(base64.b64encode(encoded).decode(), None).encoded == encoded, kind


def test_a_loaded_picture_stays_as_it_is():
    loaded = PictureLoader().load(ENCODED, None)
    assert PictureLoader().load(loaded, None) is loaded


def test_what_is_no_picture_says_what_it_is(data):
    for value, found in (
        (None, "nothing"),
        ({"bytes": None, "path": None}, "nothing"),
        (7, "int"),
        ({"url": {"url": {"url": "x"}}}, "dict"),
    ):
        assert refuse(value) == ("no image", f"found {found}; expected a path, bytes, base64 or a data: address")
    assert refuse(b"hello")[0] == "unknown image format"
    assert refuse(ENCODED[:-30])[0] == "broken image"
    assert refuse(TEXT[:-101]) == ("broken image", "base64")
    assert refuse(TEXT[:-100])[0] == "broken image"
    assert refuse("data:image/png,%89PNG") == ("broken image", "a data: address without base64")
    assert refuse("data:image/png;base64,%%%") == ("broken image", "base64")


# -- files -----------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_refused_without_waiting(data):
    os.mkfifo(data / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(data / "socket"))
    (data / "loop.png").symlink_to("loop.png")
    start = time.monotonic()
    assert refuse("pics", data) == ("image is not a file", f"{data / 'pics'}: a folder")
    for name in ("pipe", "socket", "/dev/zero", "/dev/null", "/dev/tty"):
        assert refuse(name, data) == ("image is not a file", f"{data / name}: a device, pipe or socket")
    assert refuse("gone.png", data) == ("image not read", f"{data / 'gone.png'}: No such file or directory")
    assert refuse("a\0b", data) == ("image not read", f"{data}/a\0b: not a path")
    reason, detail = refuse("x" * 5000, data)
    assert reason == "image not read" and len(detail) < 300
    assert refuse("loop.png", data)[0] == "image not read"
    assert refuse("", data) == ("image is not a file", f"{data}: a folder")
    assert refuse("file://host/a.png", data)[0] == "image not read"
    assert time.monotonic() - start < 2


def test_a_relative_path_needs_a_folder():
    assert refuse("a.png", None) == ("image not read", "a relative path in data without a folder")


def test_a_file_beyond_the_limit_is_not_read_into_memory(data, monkeypatch):
    with open(data / "huge.png", "wb") as file:
        file.write(ENCODED)
        file.truncate(1 << 40)
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    with pytest.raises(Unusable) as caught:
        PictureLoader().load("huge.png", data)
    assert (caught.value.reason, caught.value.n_found, caught.value.n_limit) == ("image too large", 1 << 40, 1 << 20)


def test_the_pictures_of_a_record_are_limited_together(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_RECORD_BYTES", 3 * len(ENCODED))
    assert len(PictureLoader().load_all([ENCODED] * 3, None)) == 3
    with pytest.raises(Unusable, match="image too large"):
        PictureLoader().load_all([ENCODED] * 4, None)


def test_the_folder_of_data_is_that_of_its_file(data):
    (data / "pairs.jsonl").touch()
    assert base_folder(str(data / "pairs.jsonl")) == data
    assert base_folder(str(data)) == data  # as save_to_disk writes
    assert base_folder("-") is None and base_folder("org/name") is None


def test_files_are_stamped_also_missing_and_broken_ones(data):
    (data / "broken.png").write_bytes(ENCODED[:50])
    loader = PictureLoader()
    for name in ("pics/a b.png", "pics/a b.png", "broken.png", "gone.png"):
        with contextlib.suppress(Unusable):
            loader.load(name, data)
    whole, broken, gone = loader.stamps
    assert [Path(each.path).name for each in loader.stamps] == ["a b.png", "broken.png", "gone.png"]
    assert (whole.n_bytes, broken.n_bytes, gone.n_bytes) == (len(ENCODED), 50, None)
    now = time.time_ns() + 10**9
    assert [each.why_changed(now) for each in loader.stamps] == [None, None, None]
    os.utime(data / "broken.png")  # touched, with the same content
    assert broken.why_changed(now) is None
    (data / "pics" / "a b.png").write_bytes(ENCODED[::-1])
    os.utime(data / "pics" / "a b.png", (0, 0))  # the time of its change still shows
    assert whole.why_changed(0) == f"{whole.path} has changed"
    (data / "broken.png").unlink()
    assert broken.why_changed(now) == f"{broken.path} is gone"
    (data / "gone.png").touch()
    assert gone.why_changed(now) == f"{gone.path} was missing"
    loader.start_part()
    assert loader.stamps == []


def test_a_picture_that_several_examples_share_is_decoded_once(data, monkeypatch):
    n_decoded, decode = [], pictures.images.decode
    monkeypatch.setattr(pictures.images, "decode", lambda encoded: n_decoded.append(1) or decode(encoded))
    loader = PictureLoader()
    for value in ("pics/a b.png", ENCODED, TEXT, "pics/a b.png"):
        loader.load(value, data)
    assert len(n_decoded) == 1


# -- the network -----------------------------------------------------------------------------------------------------


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name, _, rest = self.path[1:].partition("/")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif name == "flaky" and self.server.asked.count(self.path) < 3:
            self.send_error(503)
        elif name in ("image.png", "flaky"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(ENCODED)))
            self.end_headers()
            self.wfile.write(ENCODED)
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(ENCODED)))
            self.end_headers()
            self.wfile.write(ENCODED[:-5])
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass
        elif name == "slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif name == "silent":
            time.sleep(2)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pictures, "_PAUSES", (0.0, 0.0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as serving:
        serving.asked, serving.daemon_threads = [], True
        serving.host = f"127.0.0.1:{serving.server_port}"
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()


def test_nothing_is_fetched_from_a_host_that_is_not_named(server):
    address = f"http://{server.host}/image.png"
    for hosts in ((), ("127.0.0.1",), ("example.org",)):  # without a port, the usual one is meant
        assert refuse(address, image_hosts=hosts) == (
            "image not fetched",
            f"{server.host} is not one of prepare.image_hosts",
        )
    assert refuse(f"http://me:secret@{server.host}/image.png", image_hosts=[server.host])[0] == "image not fetched"
    assert server.asked == []


def test_a_picture_is_fetched_once(server):
    loader = PictureLoader([server.host])
    for value in (f"http://{server.host}/image.png", {"url": f"HTTP://{server.host}/image.png"}):
        assert loader.load(value, None).encoded == ENCODED
    address = f"http://{server.host}/image.png"
    assert loader.load(address, None) is loader.load(address, None)
    assert server.asked == ["/image.png"] * 2 and loader.stamps == []


def test_redirects_are_followed_within_the_host_only(server):
    loader = PictureLoader([server.host, "localhost", f"localhost:{server.server_port}"])
    assert loader.load(f"http://{server.host}/redirect//image.png", None).encoded == ENCODED
    server.asked.clear()
    for target, why in (
        (f"http://localhost:{server.server_port}/image.png", " redirects to another host"),
        ("ftp://127.0.0.1/x", " redirects to another host"),
        ("file:///etc/passwd", ": HTTP 302"),  # urllib itself
    ):
        with pytest.raises(Unusable) as caught:
            loader.load(f"http://{server.host}/redirect/{target}", None)
        assert caught.value.detail == f"{server.host}{why}"
    assert len(server.asked) == 3
    with pytest.raises(Unusable, match="image not fetched"):
        loader.load(
            f"http://{server.host}/redirect//redirect//redirect//redirect//redirect//redirect//redirect//x", None
        )


def test_a_failure_that_may_pass_is_tried_again(server):
    assert PictureLoader([server.host]).load(f"http://{server.host}/flaky", None).encoded == ENCODED
    assert server.asked == ["/flaky"] * 3
    server.asked.clear()
    assert refuse(f"http://{server.host}/gone", image_hosts=[server.host]) == (
        "image not fetched",
        f"{server.host}: HTTP 404",
    )
    assert server.asked == ["/gone"]
    assert refuse(f"http://{server.host}/short", image_hosts=[server.host])[1] == f"{server.host}: ConnectionError"


def test_size_and_time_are_limited(server, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    assert refuse(f"http://{server.host}/endless", image_hosts=[server.host])[0] == "image too large"
    monkeypatch.setattr(pictures, "_DEADLINE", 0.3)
    monkeypatch.setattr(pictures, "_TIMEOUT", 0.3)
    start = time.monotonic()
    for name in ("slow", "silent"):
        assert refuse(f"http://{server.host}/{name}", image_hosts=[server.host]) == (
            "image not fetched",
            f"{server.host}: TimeoutError",
        )
    assert time.monotonic() - start < 5
