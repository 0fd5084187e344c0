"""Drive a real Chromium over its debugging pipe, to see what a page does and how it looks."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Page:
    """One tab: send commands of the DevTools protocol, and collect their answers and events."""

    def __init__(self, into: int, out: Any) -> None:
        self._into, self._out, self._number, self._session = into, out, 0, None
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": arguments, **session}
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._out.read(1)) != b"\0":
            assert byte, "Chromium ended"
            data += byte
        message: dict[str, Any] = json.loads(data)
        if "method" in message:
            self.events.append(message)
        return message

    def of(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of these kinds."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def open(self, file: Path, width: int = 1440, *, dark: bool = False, media: str = "") -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        n = len(self.of("Page.loadEventFired"))
        self("Page.navigate", url=file.absolute().as_uri())
        while len(self.of("Page.loadEventFired")) == n:
            # A dialog would block the page for ever.
            assert not self.of("Page.javascriptDialogOpening"), self.of("Page.javascriptDialogOpening")
            self._read()

    def value(self, script: str) -> Any:
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """Save the whole page as PNG."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        whole = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Yield a tab of a browser with an empty profile."""
    assert CHROMIUM is not None
    theirs_in, into = os.pipe()
    out, theirs_out = os.pipe()
    # Chromium reads commands on descriptor 3 and answers on 4.
    arguments = (
        f"--headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir={profile} --remote-debugging-pipe"
    )
    command = f'exec "$0" {arguments} 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with open(out, "rb") as answers:
            page = Page(into, answers)
            yield page
            page("Browser.close")
    finally:
        os.close(into)
        process.terminate()
        process.wait(20)
