"""Text measured before it is drawn: what is measured is what is drawn, in scripts with and without a built-in font."""

import logging

import numpy as np
import pytest

from utils.plots import boxes as fonts


@pytest.mark.parametrize("text", ["person 0.88", "Ågjpqy", "汽车 0.91", "かな", "사람", "Привет", "العربية"])
def test_text_fits_into_its_measured_width_and_line(text):
    image = np.zeros((60, 400, 3), np.uint8)
    fonts.draw_text(image, text, 20, 40, 20, (255, 255, 255))
    rows, columns = np.nonzero(image.max(2))
    assert columns.min() >= 19
    assert columns.max() <= 21 + fonts.text_width(text, 20)
    assert rows.min() >= 40 - fonts.ASCENT * 20 - 1
    assert rows.max() <= 40 + (fonts.LINE_HEIGHT - fonts.ASCENT) * 20 + 1


def test_text_is_set_smaller_before_it_is_shortened():
    assert fonts.fit_text("person", 500, 20, 9) == ("person", 20)
    text, size = fonts.fit_text("person", fonts.text_width("person", 13), 20, 9)
    assert (text, size) == ("person", 13)
    text, size = fonts.fit_text("a rather long class name", 60, 20, 9)
    assert size == 9
    assert text.endswith("…")
    assert fonts.text_width(text, 9) <= 60
    assert fonts.text_width("a rather long class name"[: len(text)] + "…", 9) > 60  # one letter more would not fit


def test_characters_without_any_font_are_named_once(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: iter(()))
    fonts._font_with.cache_clear()
    with caplog.at_level(logging.WARNING, "yolov5"):
        logging.getLogger("yolov5").propagate = True
        fonts.text_width("ა", 20)
        fonts.text_width("ა", 12)
    fonts._font_with.cache_clear()
    assert [record.message for record in caplog.records] == [
        "WARNING: no installed font has 'ა': drawn as '?' in images."
    ]


def test_installed_font_is_used_where_the_built_in_one_lacks_characters():
    fonts._font_with.cache_clear()
    if fonts._font_for("ა") is None:
        pytest.skip("no installed font has Georgian letters")
    images = []
    for text in ("ა", "ბ"):
        image = np.full((50, 80, 3), 90, np.uint8)
        fonts.draw_text(image, text, 10, 30, 20, (0, 255, 0))
        rows, columns = np.nonzero((image != 90).any(2))
        assert 9 <= columns.min() <= columns.max() <= 11 + fonts.text_width(text, 20)
        assert 8 <= rows.min() <= rows.max() <= 37
        images.append(image)
    assert not np.array_equal(*images)


def test_file_that_is_no_font_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "broken.ttf"
    broken.write_text("not a font")
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: iter([str(broken)]))
    fonts._font_with.cache_clear()
    assert fonts._font_for("ა") is None
    fonts._font_with.cache_clear()
