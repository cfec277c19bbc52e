"""What several test files share: a small phantom, prepared once a session, and a browser."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [shutil.which("chromedriver"), shutil.which("chromium")]


def pytest_collection_modifyitems(items):
    """Whole commands first: processes that take one file after the other then end together."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests")


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Root of a prepared phantom DeepLesion of a few patients."""
    from deeplesion.data.prepare import prepare
    from deeplesion.phantom.make import make_phantom

    root = tmp_path_factory.mktemp("phantom") / "DeepLesion"
    make_phantom(root, patients=6, size=128, seed=3)
    prepare(root, workers=1)
    for split in ("train", "val", "test"):
        assert json.loads((root / f"annotations/{split}.json").read_text())["images"]
    return root


@pytest.fixture(scope="session")
def cached_phantom(phantom, tmp_path_factory) -> Path:
    """A copy of the phantom with a slice cache, as tools/prepare_data.py --cache leaves it."""
    from deeplesion.data.slice_cache import fill_cache

    root = tmp_path_factory.mktemp("cached") / "DeepLesion"
    shutil.copytree(phantom, root)
    report = fill_cache(root, 7, workers=1)
    assert report.exit_code == 0 and report.written == report.slices > 20
    return root


class Browser:
    """As much of a WebDriver client as the tests of pages need.

    Speaks the W3C WebDriver protocol to chromedriver itself; Debian has both as `chromium` and
    `chromium-driver`.
    """

    def __init__(self, port):
        self.server = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": PROGRAMS[1], "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.session = ""
        found = self.call("session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{found['sessionId']}"

    def call(self, command, content=None, method=None):
        body = None if content is None else json.dumps(content).encode()
        url = f"{self.server}{self.session}/{command}".rstrip("/")
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        request.method = method or ("GET" if body is None else "POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.call("url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        return self.call("execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def count(self, selector):
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def press(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def type(self, key):
        """A key to whatever has the focus, as from a keyboard."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def choose(self, name, value):
        """Sets a field of the filters, as a click does."""
        self.run(
            "const fields = document.getElementById('filters').elements;"
            "fields[arguments[0]].value = arguments[1];"
            "fields.thickness.dispatchEvent(new Event('change', {bubbles: true}))",
            name,
            value,
        )

    def log(self, kind):
        return self.call("se/log", {"type": kind})

    def resize(self, width, height):
        self.call("window/rect", {"width": width, "height": height})


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium."""
    if not all(PROGRAMS):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    log = tmp_path_factory.mktemp("chromedriver") / "log"
    with open(log, "w") as output:
        driver = subprocess.Popen([PROGRAMS[0], "--port=0"], stdout=output, stderr=output)
    try:
        port = None
        for _ in range(300):
            time.sleep(0.1)
            words = log.read_text().split("started successfully on port ")
            if len(words) > 1 and "\n" in words[1]:
                port = int(words[1].split("\n")[0].rstrip("."))
                break
        assert port, log.read_text()
        try:
            browser = Browser(port)
        except (urllib.error.HTTPError, OSError) as error:
            pytest.skip(f"Chromium is here but does not start: {error}")
        yield browser
        browser.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait()
