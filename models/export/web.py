"""A folder with a page that detects in the browser: the ONNX, ONNX Runtime for browsers, and one page of HTML.

`<stem>_web_page/` holds index.html, detector.mjs (letterbox, decoding and NMS as detect.py has them), model.onnx and
ort/. It asks nothing of other sites, and any static server will do: `python -m http.server`.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
from pathlib import Path

from models.backends import PAGE_MODEL
from models.export.formats import ORT_WEB_TARBALL
from models.export.job import ExportJob, atomic_folder
from models.export.onnx import write_model
from utils.downloads import download_file
from utils.errors import UserError
from utils.images import PAD_COLOUR
from utils.log import LOGGER
from utils.media.page import build_page
from utils.nms import MAX_CANDIDATES, MAX_SIDE_PX, MIN_SIDE_PX, NMSConfig

ORT_VERSION = ORT_WEB_TARBALL.removeprefix("onnxruntime-web-").removesuffix(".tgz")
ORT_URL = f"https://registry.npmjs.org/onnxruntime-web/-/{ORT_WEB_TARBALL}"
# as `npm view onnxruntime-web@1.30.0 dist.integrity` says
ORT_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ORT_FILES = (  # of its folder dist: for WebAssembly alone, and with WebGPU, which is loaded where there is a GPU
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
ORT_LICENCE = """\
ONNX Runtime Web, the files of this folder. Copyright (c) Microsoft Corporation. MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated \
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the \
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit \
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the \
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE \
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR \
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR \
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
LOWEST_CONF = 0.05  # that the page's slider goes down to
BOX_PX, SCORE = 1.0, 0.01  # within which WebGPU has to agree with WebAssembly
NMS = NMSConfig(max_det=1000)  # as detect.py


def export(job: ExportJob) -> Path:
    """Writes `<stem>_web_page/`, or `<stem>-int8_web_page/`; returns its path.

    Raises:
        UserError: images of another kind than a browser's, more than one at a time, or no ONNX Runtime for browsers.
    """
    if job.source.yaml["ch"] != 3:
        raise UserError(f"the model takes {job.source.yaml['ch']} channels, and images in a browser have 3")
    if job.metadata.batch > 1 and not job.metadata.dynamic:
        raise UserError(f"--batch-size {job.metadata.batch}: the page detects in one image at a time: leave it out")
    runtime = read_runtime(job.config.ort_web or ORT_WEB_TARBALL)
    path = job.path("-int8" * job.config.int8 + job.format.suffix)
    page, policy = build_page(page_settings(job))
    meta = '<meta charset="utf-8">'
    with atomic_folder(path) as folder:
        write_model(job, folder / PAGE_MODEL)
        (folder / "ort").mkdir()
        for name, content in runtime.items():
            (folder / "ort" / name).write_bytes(content)
        (folder / "ort" / "LICENSE").write_text(ORT_LICENCE, encoding="utf-8")
        script = Path(__file__).with_name("detector.mjs")
        (folder / script.name).write_bytes(script.read_bytes())
        secured = page.replace(meta, f'{meta}\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
        (folder / "index.html").write_text(secured, encoding="utf-8")
    LOGGER.info(f"Open the page: python -m http.server --directory {path}, then http://localhost:8000")
    return path


def page_settings(job: ExportJob) -> dict[str, object]:
    """Returns what the page and its detector are told."""
    metadata = job.metadata
    return {
        "model": f"{job.weights.stem}" + " int8" * job.config.int8,
        "worker": "detector.mjs",
        "file": PAGE_MODEL,
        "names": metadata.names,
        "shapeHw": metadata.shape_hw,
        "stride": metadata.stride,
        "dynamic": metadata.dynamic,
        "padColour": PAD_COLOUR,
        "conf": NMS.conf_thres,
        "lowestConf": LOWEST_CONF,
        "iou": NMS.iou_thres,
        "maxDet": NMS.max_det,
        "minSide": MIN_SIDE_PX,
        "maxSide": MAX_SIDE_PX,
        "maxCandidates": MAX_CANDIDATES,
        "boxPx": BOX_PX,
        "score": SCORE,
    }


def read_runtime(tarball: str | Path) -> dict[str, bytes]:
    """Returns ONNX Runtime's files for browsers, by name, from its tarball, which is fetched where it is not there.

    Raises:
        UserError: no such file and it cannot be fetched, or it is not the known one, by its hash.
    """
    tarball = Path(tarball)
    if not tarball.is_file():
        download_file(ORT_URL, tarball)
    try:
        found = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode("ascii")
    except OSError as error:
        raise UserError(f"{tarball}: cannot be read ({error.strerror})") from error
    if found != ORT_INTEGRITY:
        raise UserError(
            f"{tarball}: its hash ({found}) is not that of onnxruntime-web {ORT_VERSION} ({ORT_INTEGRITY}). Delete it, "
            "and it is fetched anew"
        )
    with tarfile.open(tarball) as archive:
        return {name: archive.extractfile(f"package/dist/{name}").read() for name in ORT_FILES}
