"""report.html: what stands in it, that names are text, and how it looks in a headless Chromium, narrow and wide."""

import re

import cv2
import numpy as np
import pytest

from tests.browser import Browser, needs_browser, started_driver
from tests.utils.eval.test_evaluate import ELSEWHERE, EXACT, Scripted, evaluate, wide_batch
from utils.dataloaders.labels import LabelTable
from utils.eval.figures import metrics_content
from utils.eval.report_page import write_report

NAMES = {0: "<b>cat</b>", 1: "红绿灯"}
CSV = (
    "epoch,train/box_loss,train/obj_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,"
    "val/box_loss,x/lr0\n0,0.1,nan,0.2,0.3,0.4,0.2,0.11,0.00263\n1,0.08,0.05,0.3,0.4,0.5,0.3,0.1,0.00151\n"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on two images: one where all is well, and one with a sure mistake beside a miss."""
    folder = tmp_path_factory.mktemp("report")
    batches = [wide_batch("good"), wide_batch("bad")]
    for batch, name in zip(batches, ("good", "bad"), strict=True):
        cv2.imwrite(str(folder / f"{name}.jpg"), np.full((100, 200, 3), 90, np.uint8))
        batch.paths[0] = str(folder / f"{name}.jpg")
    result = evaluate(Scripted([[EXACT]], [[ELSEWHERE]]), batches, names=NAMES, keep_records=True)
    table = LabelTable(
        image_paths=[batch.paths[0] for batch in batches],
        sizes_wh=np.array([(200, 100)] * 2, np.int32),
        rows=np.array([(0, 0.5, 0.5, 0.5, 0.6)] * 2, np.float32),
        offsets=np.array([0, 1, 2]),
        seg_points=np.zeros((0, 2), np.float32),
        seg_offsets=np.zeros(3, np.int64),
    )
    about = {"model": "runs/<i>best</i>.pt", "data": "d.yaml", "split": "val", "imgsz": 128, "seconds": 1.25}
    about |= {"energy_wh": {"cpu": 0.02}, "options": {"conf_thres": 0.001}, "versions": {"torch": "9.9"}}
    (folder / "results.csv").write_text(CSV)
    page = folder / "report.html"
    write_report(page, metrics_content(result, about), result, {"val": table}, folder / "results.csv")
    return page


def test_everything_stands_in_the_page_and_nothing_outside_it(report):
    text = report.read_text(encoding="utf-8")
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[:4] == ["Training", "Classes", "Curves at IoU 0.5", "Confusion matrix"]
    assert headings[4:] == ["Sizes of objects", "Errors", "Worst images", "Surest false positives", "Data", "Run"]
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', text)
    assert "<b>cat" not in text and "<i>best" not in text and "&lt;b&gt;cat&lt;/b&gt;" in text and "红绿灯" in text
    for told in (
        "<td>right</td><td>1</td>",
        "conf_thres",
        "9.9",
        "energy, cpu",
        "0.02 Wh",
        "highest mAP50-95 0.300 in epoch 1",
    ):
        assert told in text


def test_the_worst_image_is_shown_with_crops_of_its_errors(report):
    text = report.read_text(encoding="utf-8")
    worst = text[text.index("Worst images") : text.index("Surest false positives")]
    assert "bad.jpg: 0 right, 1 wrong, 1 missed" in worst and "good.jpg" not in worst
    assert "红绿灯 0.80: background" in worst and "missed &lt;b&gt;cat" in worst
    assert worst.count("<img") == 3  # the image and two crops
    surest = text[text.index("Surest false positives") : text.index("<h2>Data")]
    assert surest.count("<img") == 1 and "bad.jpg" in surest


def test_images_that_are_gone_and_labels_that_never_were_are_no_reason_to_stop(tmp_path):
    batch = wide_batch("gone")._replace(targets=wide_batch().targets[:0])
    result = evaluate(Scripted([[EXACT]]), [batch], names=NAMES, keep_records=True)
    write_report(tmp_path / "r.html", metrics_content(result, {"split": "val"}), result, {})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "x/gone.jpg: 0 right, 1 wrong, 0 missed" in text and "Curves" not in text and "<h2>Data" not in text


@pytest.fixture(scope="module")
def driver():
    with started_driver() as address:
        yield address


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(400, 1), (1400, 0)])
def test_it_is_whole_and_readable_in_a_browser(report, driver, width, scheme):
    browser = Browser(driver, width, 900, [f"--blink-settings=preferredColorScheme={scheme}"])
    try:
        browser.open(report.as_uri())
        assert browser.run("return innerWidth") <= max(width, 500)  # Chromium's windows have a least width
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert browser.run("return [...document.images].every(one => one.naturalWidth > 0)")
        assert browser.run("return document.querySelectorAll('svg.plot path:not(.grid)').length") >= 12
        colours = browser.run("const s = getComputedStyle(document.body); return s.color + s.backgroundColor")
        text, ground = np.array(re.findall(r"\d+", colours), float).reshape(2, 3).mean(1)
        assert abs(text - ground) > 150 and (ground > text) == bool(scheme)
        texts = "[...document.querySelectorAll('svg.plot text')].map(one => one.getBoundingClientRect().height)"
        assert browser.run(f"return Math.min(...{texts})") >= 9  # px
        outside = "one.getBoundingClientRect().left < one.ownerSVGElement.getBoundingClientRect().left"
        cut = f"[...document.querySelectorAll('svg.plot text')].filter(one => {outside}).map(one => one.textContent)"
        assert browser.run(f"return {cut}") == []
        assert browser.errors() == []
    finally:
        browser.close()
