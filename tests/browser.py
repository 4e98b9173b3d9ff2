"""A headless Chromium for tests of pages, driven by the few commands of the WebDriver protocol that are needed."""

import base64
import contextlib
import shutil
import subprocess
import time

import cv2
import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
LIMIT_S = 120  # much, for machines with other work
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the WebDriver standard's name for a reference
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


class Browser:
    """One window."""

    def __init__(self, address, width=1200, height=800, flags=()):
        self._client = httpx.Client(base_url=address, timeout=180)
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *QUIET, *flags]
        flags.append(f"--window-size={width},{height}")
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        opened = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{opened['sessionId']}"

    def _post(self, path, content):
        answer = self._client.post(path, json=content).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self._post(self._session + "/url", {"url": url})

    def run(self, script):
        return self._post(self._session + "/execute/sync", {"script": script, "args": []})

    def text_of(self, element):
        return self.run(f"return document.getElementById('{element}').textContent")

    def choose(self, path):
        found = self._post(self._session + "/element", {"using": "css selector", "value": "#file"})
        self._post(f"{self._session}/element/{found[ELEMENT]}/value", {"text": str(path)})

    def wait_for(self, script):
        end_s = time.monotonic() + LIMIT_S
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end_s, f"never true: {script}; errors: {self.errors()}"
            time.sleep(0.02)
        return value

    def screenshot(self):
        data = base64.b64decode(self._client.get(self._session + "/screenshot").json()["value"])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def errors(self):
        return [entry["message"] for entry in self._post(self._session + "/se/log", {"type": "browser"})]

    def close(self):
        self._client.delete(self._session)
        self._client.close()


@contextlib.contextmanager
def started_driver():
    """Runs ChromeDriver; yields its address."""
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(line.rsplit(" ", 1)[1].strip().rstrip(".") for line in process.stdout if "successfully on port" in line)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    process.stdout.close()
