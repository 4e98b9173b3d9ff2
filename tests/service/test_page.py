"""The page in a headless Chromium: an image is chosen, boxes appear, the slider thins them out, errors are told."""

import cv2
import numpy as np
import pytest

from tests.browser import Browser, needs_browser, started_driver

pytestmark = needs_browser


@pytest.fixture(scope="module")
def driver():
    with started_driver() as address:
        yield address


@pytest.fixture
def open_page(driver, server):
    opened = []

    def start(**how):
        opened.append(Browser(driver, **how))
        opened[-1].open(server.url)
        return opened[-1]

    yield start
    for browser in opened:
        browser.close()


def test_chosen_image_shows_its_boxes_and_the_slider_thins_them_out(open_page, draw, expected, tmp_path):
    image = draw(1, 96, 128)
    found = expected(image, 0.05)
    cv2.imwrite(str(tmp_path / "scene.png"), image)
    page = open_page()
    page.choose(tmp_path / "scene.png")
    count = page.wait_for("document.getElementById('found').dataset.count")
    assert int(count) == (found[:, 4] >= 0.25).sum()
    assert page.run("return document.querySelectorAll('#objects li').length") == int(count)
    assert "ms in all" in page.text_of("time") and "inference" in page.text_of("time")
    assert page.run("return document.getElementById('canvas').getAttribute('aria-label')").startswith("The image with")
    move = "const at = document.getElementById('threshold'); at.value = 0.5; at.dispatchEvent(new Event('input'))"
    page.run(move)
    fewer = page.run("return document.getElementById('found').dataset.count")
    assert int(fewer) == (found[:, 4] >= 0.5).sum() < int(count)
    assert page.errors() == []


def test_boxes_are_drawn_where_they_were_found(open_page, expected, tmp_path):
    image = np.full((64, 64, 3), 114, np.uint8)
    image[16:48, 16:48] = (20, 200, 240)
    cv2.imwrite(str(tmp_path / "square.png"), image)
    best = expected(image, 0.05)[0]
    page = open_page()
    page.choose(tmp_path / "square.png")
    page.wait_for("document.getElementById('found').dataset.count")
    script = (
        f"const at = document.getElementById('threshold'); at.value = {best[4] - 0.001}; at.step = 'any';"
        f"at.value = {best[4] - 0.001}; at.dispatchEvent(new Event('input'));"
        "const c = document.getElementById('canvas'), scale = c.width / 64;"
        f"const x = {(best[0] + best[2]) / 2} * scale, y = Math.min({best[3]} * scale, c.height - 1);"
        "return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)"
    )
    from utils.plots.boxes import colors

    assert np.allclose(page.run(script), colors(best[5]), atol=60)


def test_file_that_is_no_image_is_told_in_words(open_page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not an image")
    page = open_page()
    for name, words in (("broken.png", "is not a readable image"), ("notes.txt", "is not an image")):
        page.choose(tmp_path / name)
        page.wait_for(f"document.getElementById('error').textContent.includes({words!r})")
        assert page.text_of("found") == "No result"


def test_page_fits_a_phone_and_follows_the_dark_setting(open_page):
    light = open_page(width=500, height=800)
    assert light.run("return document.documentElement.scrollWidth <= innerWidth")
    dark = open_page(width=500, height=800, flags=("--blink-settings=preferredColorScheme=0",))
    assert light.screenshot()[5, 5].min() > 200 and dark.screenshot()[5, 5].max() < 60


def test_page_needs_nothing_from_elsewhere(client):
    import re

    page = client.get("/").text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "//cdn" not in page and "@import" not in page
    assert "tiny.onnx" in page and "{{" not in page
