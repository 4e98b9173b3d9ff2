"""The page that detects in the browser: what its folder holds, its arithmetic, and its boxes in a real browser."""

import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

import export
from models.backends import load_backend
from models.export import web
from models.export.formats import ORT_WEB_TARBALL
from models.inference.predictor import Predictor
from tests.campaigns.interruptions import MODEL
from utils.boxes import scale_boxes
from utils.cli import ReportedError
from utils.errors import UserError
from utils.files import ROOT
from utils.images import letterbox, read_image
from utils.nms import NMSConfig, non_max_suppression

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package)
DETECTOR = ROOT / "models" / "export" / "detector.mjs"
IMAGE = ROOT / "data" / "images" / "shapes-wide.jpg"
TARBALL = Path(os.environ.get("ORT_WEB", ROOT / ORT_WEB_TARBALL))
SHOWN = {"lowestConf": 0.3, "iou": 0.45, "maxDet": 40, "minSide": 2, "maxSide": 7680, "maxCandidates": 30000}


def in_node(script: str, *inputs):
    """Runs a script with the detector's functions in Node.js, on `inputs`; returns what it makes of them."""
    node = shutil.which("node") or pytest.skip("needs node")
    lines = f"import * as detector from {json.dumps(DETECTOR.as_uri())}; import fs from 'node:fs';"
    lines += f"const inputs = JSON.parse(fs.readFileSync(0)); console.log(JSON.stringify(await ({script})(...inputs)));"
    command = [node, "--input-type=module", "--eval", lines]
    done = subprocess.run(command, input=json.dumps(inputs), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("hw", "shape_hw", "dynamic"),
    [
        ((37, 61), (64, 96), False),
        ((61, 37), (64, 96), False),
        ((90, 40), (64, 96), True),
        ((64, 96), (64, 96), False),
        ((3, 64), (64, 96), False),
    ],
)
def test_images_are_fitted_into_the_input_as_elsewhere(hw, shape_hw, dynamic):
    """A level is 1/255; all but a few that OpenCV enlarges are the same."""
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3)).astype(np.uint8)
    image = cv2.blur(image, (3, 3))
    boxed = letterbox(image, shape_hw, auto=dynamic, stride=32)
    settings = {"shapeHw": shape_hw, "stride": 32, "dynamic": dynamic, "padColour": [114] * 3}
    script = "(...given) => {const found = detector.letterbox(...given); return {...found, input: [...found.input]}}"
    found = in_node(script, cv2.cvtColor(image, cv2.COLOR_BGR2RGBA).ravel().tolist(), *hw[::-1], settings)
    assert found["hw"] == list(boxed.image.shape[:2])
    planes = np.array(found["input"]).reshape(3, *found["hw"]) * 255
    apart = np.abs(planes - boxed.image[..., ::-1].transpose(2, 0, 1))
    assert apart.max() < 1.01 and (apart > 0.01).mean() < 0.01
    box = np.array([[3.0, 4.0, 50.0, 30.0]])
    (expected,) = scale_boxes(found["hw"], box.copy(), hw, boxed.ratio_pad(hw)).tolist()
    assert in_node("detector.toImage", box[0].tolist(), *hw[::-1], found) == pytest.approx(expected, abs=1e-4)


def test_detections_are_chosen_as_elsewhere():
    """Crowded rows with ties, too small and too large boxes and more than may be kept."""
    generator = np.random.default_rng(1)
    rows = generator.random((400, 8)).astype(np.float32)
    rows[:, :4] *= (120, 120, 60, 60)
    rows[:, 4:] = np.round(rows[:, 4:], 1)
    rows[::9, 2], rows[4::50, 3] = 1.5, 9000
    for classes in (3, 1):
        (expected,) = non_max_suppression(rows[None, :, : 5 + classes], 0.3, 0.45, max_det=40)
        script = "(rows, columns, settings) => detector.suppress(Float32Array.from(rows), columns, settings)"
        found = in_node(script, rows[:, : 5 + classes].ravel().tolist(), 5 + classes, SHOWN)
        given = [[*one["xyxy"], one["confidence"], one["class"]] for one in found]
        assert len(expected) > 20 and np.array_equal(np.array(given, np.float32), expected)


@pytest.mark.parametrize(
    ("place", "by", "box", "score"),
    [(0, 0.0, 0, 0), (2, 3.0, 3, 0), (12, 0.5, 0, 0.5), (6, np.nan, 0, np.inf), (16, 3.0, 0, 0)],
)
def test_runtimes_are_compared_by_their_best_boxes_and_all_scores(place, by, box, score):
    """The third row, the least confident, is not among the two best: its box does not count."""
    rows = np.array([[9, 9, 4, 4, 0.9, 0.9, 0.1], [5, 5, 4, 4, 0.8, 0.2, 0.8], [1, 1, 4, 4, 0.1, 0.1, 0.1]]).ravel()
    others = rows.copy()
    others[place] += by
    script = "(a, b) => {const at = detector.differences(Float32Array.from(a), Float32Array.from(b), 7, 2);"
    script += "return [at.box, at.score].map(String)}"
    text = json.loads(json.dumps([None if np.isnan(value) else value for value in others]))
    script = script.replace("Float32Array.from(b)", "Float32Array.from(b, (v) => v ?? NaN)")
    found = [float(value.replace("Infinity", "inf")) for value in in_node(script, rows.tolist(), text)]
    assert found == pytest.approx([box, score], abs=1e-6)


@pytest.mark.parametrize(
    ("adapter", "other", "words", "chosen"),
    [
        ("{info: {}}", {"by": 0.001, "ms": 5}, "WebGPU (agrees with WebAssembly: boxes within 0.00", True),
        ("{info: {}}", {"by": 2, "ms": 5}, "WebAssembly (WebGPU does not agree: boxes within 2.0 px", False),
        ("{info: {}}", {"by": 0, "ms": 50}, "WebAssembly (WebGPU takes 50 ms instead of 20)", False),
        ("{info: {}}", {"by": None, "ms": 5}, "WebAssembly (WebGPU fails: no kernel)", False),
        ("{info: {isFallbackAdapter: true}}", {}, "WebAssembly (no GPU that WebGPU may use)", False),
        ("null", {}, "WebAssembly (no GPU that WebGPU may use)", False),
    ],
)
def test_webgpu_takes_over_only_where_it_agrees_and_is_faster(adapter, other, words, chosen):
    script = """async (other) => {
      Object.defineProperty(globalThis, "navigator", {value: {gpu: {requestAdapter: async () => (ADAPTER)}}});
      const answer = {rows: Float32Array.of(9, 9, 4, 4, 0.5, 0.5), columns: 6, ms: 20};
      const open = async () => {
        if (other.by === null) throw new Error("no kernel");
        const rows = answer.rows.map((value, at) => at ? value : value + other.by);
        return async () => ({...answer, rows, ms: other.ms});
      };
      const wasm = async () => answer, at = new detector.Detector({boxPx: 1, score: 0.01}, wasm, open);
      return [at.chosen, await at.choose({boxed: {}, answer}), at.chosen, at.run !== wasm];
    }"""
    before, said, after, taken = in_node(script.replace("ADAPTER", adapter), other)
    assert said.startswith(words) and (before, after, taken) == (False, True, chosen)


@pytest.fixture
def tarball(tmp_path, monkeypatch):
    """A tarball with files of the right names, which passes for the known one."""
    path = tmp_path / ORT_WEB_TARBALL
    with tarfile.open(path, "w:gz") as archive:
        for name in web.ORT_FILES:
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    with pytest.raises(UserError, match="is not that of onnxruntime-web 1.30.0") as caught:
        web.read_runtime(path)
    monkeypatch.setattr(web, "ORT_INTEGRITY", str(caught.value).partition("its hash (")[2].partition(")")[0])
    return path


def test_the_folder_holds_all_that_a_browser_needs_and_is_compared(write_checkpoint, tarball, caplog):
    weights = write_checkpoint()
    with caplog.at_level("INFO", "yolov5"):
        words = {"imgsz": [64, 96], "include": "web", "ort_web": str(tarball)}
        (path,) = export.run(weights=str(weights), **words)
    assert path == str(weights.with_name("best_web_page"))
    names = {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()}
    own = {"index.html", "detector.mjs", "model.onnx", "ort/LICENSE"}
    assert names == own | {f"ort/{one}" for one in web.ORT_FILES}
    assert Path(path, "ort", web.ORT_FILES[0]).read_text() == web.ORT_FILES[0]
    page = Path(path, "index.html").read_text(encoding="utf-8")
    settings = json.loads(page.partition('id="settings">')[2].partition("</script>")[0])
    assert settings["names"] == {"0": "ant", "1": "bee", "2": "fly"}
    assert (settings["shapeHw"], settings["dynamic"], settings["conf"]) == ([64, 96], False, 0.25)
    assert "default-src 'none'" in page and "{{" not in page
    assert any("Web page: parity with best.pt on" in message for message in caplog.messages)


def test_what_the_page_cannot_do_is_refused(write_checkpoint, tarball, tmp_path, caplog):
    weights = str(write_checkpoint())
    with pytest.raises(ReportedError, match="Web page was not exported"):
        export.main(export.build_parser().parse_args(["--weights", weights, "--include", "web", "--batch-size", "2"]))
    assert "the page detects in one image at a time" in caplog.text
    with pytest.raises(UserError, match="--half: Web page cannot"):
        export.run(weights=weights, include="web", half=True)
    with pytest.raises(UserError, match="--ort-web has no effect here: it is for the formats web"):
        export.run(weights=weights, include="onnx", ort_web=str(tarball))
    with pytest.raises(UserError, match="no such file. It is made by: npm pack onnxruntime-web@1.30.0"):
        export.run(weights=weights, include="web", ort_web=str(tmp_path / "other.tgz"))


def test_the_runtime_is_fetched_only_where_it_is_not_there(tarball, tmp_path, monkeypatch):
    content, asked = tarball.read_bytes(), []

    def download(url, target):
        asked.append(url)
        target.write_bytes(content)

    monkeypatch.setattr(web, "download_file", download)
    monkeypatch.chdir(tmp_path)
    assert set(web.read_runtime(ORT_WEB_TARBALL)) == set(web.ORT_FILES) and asked == []
    tarball.unlink()
    assert set(web.read_runtime(ORT_WEB_TARBALL)) == set(web.ORT_FILES)
    assert asked == ["https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"]


@pytest.fixture(scope="module")
def window():
    """One window for all pages: to start a browser takes longest."""
    browser = pytest.importorskip("tests.browser")
    if not (browser.CHROMIUM and browser.DRIVER):
        pytest.skip("needs chromium and chromedriver")
    if not TARBALL.is_file():
        pytest.skip(f"needs {TARBALL}: npm pack onnxruntime-web@{web.ORT_VERSION} makes it ($ORT_WEB names another)")
    with browser.started_driver() as address, contextlib.closing(browser.Browser(address)) as opened:
        yield opened


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments) -> None:
        """Says nothing."""


@contextlib.contextmanager
def served(folder):
    """Serves a folder as `python -m http.server` does; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def objects_in(page, image):
    """Chooses an image and returns the boxes (k, 6) that the page has found."""
    page.choose(image)
    page.wait_for("document.getElementById('found').dataset.count")
    sides = ("xmin", "ymin", "xmax", "ymax", "confidence", "class")
    return np.array([[one[side] for side in sides] for one in page.run("return state.objects")])


def test_a_page_opened_as_a_file_says_that_it_needs_a_server(write_checkpoint, window, tmp_path):
    (tmp_path / "small.yaml").write_text(MODEL)
    weights = write_checkpoint(tmp_path / "small.yaml")
    (path,) = export.run(weights=str(weights), include="web", imgsz=64, ort_web=str(TARBALL))
    window.open(Path(path, "index.html").absolute().as_uri())
    assert "only from a web server, such as: python -m http.server" in window.text_of("error")
    window.choose(IMAGE)
    window.wait_for("document.getElementById('found').textContent === 'No result'")
    assert window.errors() == []


def compare(path, image, window, at_least):
    """Opens a folder's page with an image and compares its boxes with those that detect.py finds."""
    backend = load_backend(path)
    predictor = Predictor(backend, NMSConfig(web.LOWEST_CONF, max_det=web.NMS.max_det), backend.metadata.shape_hw)
    expected = predictor.detect(read_image(image)).rows
    with served(path) as address:
        window.open(address)
        found = objects_in(window, image)
        assert "WebAssembly" in window.text_of("model") and "inference" in window.text_of("time")
        assert [message for message in window.errors() if "No available adapters" not in message] == []  # of GPUs
    assert len(expected) >= at_least and found.shape == expected.shape
    nearest = [np.abs(found - row).max(1).argmin() for row in expected]  # of equal confidences any may come first
    assert sorted(nearest) == list(range(len(found)))
    far = np.abs(found[nearest] - expected).max(0)
    assert far[:4].max() < 0.1 and far[4] < 1e-3 and far[5] == 0


@pytest.mark.parametrize(("head", "how"), [("Detect, [nc, anchors]", {}), ("DetectAF, [nc, 16]", {"dynamic": True})])
def test_a_browser_finds_the_boxes_that_detect_finds(head, how, write_checkpoint, window, tmp_path):
    """With an image that is not enlarged: among a new model's crowded boxes some would change sides at a limit."""
    (tmp_path / "small.yaml").write_text(MODEL.replace("Detect, [nc, anchors]", head))
    weights = write_checkpoint(tmp_path / "small.yaml", sure=True)
    (path,) = export.run(weights=str(weights), include="web", imgsz=[192, 256], ort_web=str(TARBALL), **how)
    image = tmp_path / "scene.png"
    cv2.imwrite(str(image), cv2.resize(read_image(IMAGE), (256, 192)))
    compare(path, image, window, at_least=20)


def test_a_browser_finds_what_is_in_a_photo(golden_dir, window, tmp_path):
    weights = tmp_path / "n.pt"
    weights.write_bytes((golden_dir / "yolov5n-v6-coco.pt").read_bytes())
    (path,) = export.run(weights=str(weights), include="web", imgsz=[256, 320], ort_web=str(TARBALL))
    compare(path, golden_dir / "images" / "bus.jpg", window, at_least=4)
