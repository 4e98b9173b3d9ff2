"""The service's routes: an image in, boxes or an image with boxes out; health, metrics, and one page for people.

A request is admitted (or refused at once), read within limits, decoded and letterboxed in a thread as soon as the
images of the others leave room for its pixels, queued, and answered; when its client leaves it is dropped. Not here:
the server and its options (`serve.py`).
"""

from __future__ import annotations

import asyncio
import html
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cv2
import numpy as np
from fastapi import FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from models.inference.predictor import Predictor
from service.batching import Batcher, InferenceError, Prepared
from service.guard import HEADERS, Guard, TrustedHosts
from service.metrics import Metrics, StageClock
from service.uploads import FIELD, Upload, check_upload, decode_upload
from utils.boxes import Detections
from utils.errors import UserError
from utils.files import find_file
from utils.media.page import build_page, hash_of
from utils.nms import NMSConfig
from utils.page import fill_page, html_table
from utils.plots.boxes import class_name, draw_detections

YOLOV5_ROUTE, ROUTE, BATCH_ROUTE = "/v1/object-detection/yolov5s", "/v1/detect", "/v1/detect/batch"
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})  # that need no key
MAX_DECODERS = 4
DECODED_PIXELS = 100_000_000  # at once, over all requests: 300 MB, and as much again while boxes are drawn
JPEG_QUALITY, JPEG_MAX_SIDE = 90, 65_500  # px, the format's own
RETRY_AFTER_S = 1
SHORTEST_KEY = 16
CLIENT_LEFT = 499  # nobody sees it; the number that servers log by custom

T = TypeVar("T")
Fraction = Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)]
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": [FIELD], "properties": {FIELD: BINARY}}
FORM_OF_MANY = {"type": "object", "required": [FIELD], "properties": {FIELD: {"type": "array", "items": BINARY}}}
BATCH_SCHEMA = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_OF_MANY}}}}
UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": FORM}, "image/*": {"schema": BINARY}},
    }
}


@dataclass(frozen=True)
class ServeConfig:
    """serve.py's options, under their names and with their meanings; defaults are the command line's."""

    weights: str | Path | Sequence[str]
    imgsz: Sequence[int] | None
    conf_thres: float
    iou_thres: float
    max_det: int
    device: str
    half: bool
    host: str
    port: int
    trusted_hosts: Sequence[str]
    batch_size: int
    batch_wait_ms: float
    max_image_mb: float
    max_pixels: float
    queue: int
    max_images: int
    api_keys: str

    @property
    def max_image_bytes(self) -> int:
        """Largest image file."""
        return int(self.max_image_mb * 2**20)


class Budget:
    """An amount that requests share; they get their parts in the order in which they ask."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._turn, self._returned = asyncio.Lock(), asyncio.Event()

    async def take(self, amount: int) -> None:
        """Waits until so much is free and takes it; the total at most."""
        async with self._turn:  # none is overtaken for ever by smaller ones
            while self._free < amount:
                self._returned.clear()
                await self._returned.wait()
            self._free -= amount

    def give_back(self, amount: int) -> None:
        """Gives back what was taken."""
        self._free += amount
        self._returned.set()


class Service:
    """A model behind HTTP: what one request goes through.

    Attributes:
        predictor: the model; its `nms` holds where a request does not say.
        config: what a request may ask for.
        batcher: the queue before the model.
        metrics: the counters.
    """

    def __init__(self, predictor: Predictor, config: ServeConfig) -> None:
        self.predictor, self.config = predictor, config
        self._active = 0
        self.metrics = Metrics(lambda: len(self.batcher), lambda: self._active)
        counters = (self.metrics.batch, self.metrics.dropped)
        self.batcher = Batcher(self._predict, config.batch_size, config.batch_wait_ms / 1000, *counters)
        self._pixels = Budget(max(DECODED_PIXELS, int(config.max_pixels)))
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_DECODERS), "decode")

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncIterator[None]:
        """Works for the time of the block; on leaving it finishes what is queued."""
        self.batcher.start()
        yield
        await self.batcher.close()
        self._pool.shutdown()

    def nms(self, conf: float | None, iou: float | None) -> NMSConfig:
        """Returns how a request's detections are chosen, the defaults in place of None.

        Raises:
            HTTPException: 422 the model chooses its boxes itself and is asked to choose otherwise.
        """
        backend, chosen = self.predictor.backend, self.predictor.nms
        if backend.has_nms:
            inside = backend.metadata.nms
            if iou is not None and iou != inside.iou_thres:
                raise HTTPException(422, f"iou {iou:g}: NMS is inside this model, with IoU {inside.iou_thres:g}")
            if conf is not None and conf < inside.conf_thres:
                raise HTTPException(422, f"conf {conf:g}: this model itself drops boxes below {inside.conf_thres:g}")
        chosen = chosen if conf is None else replace(chosen, conf_thres=conf)
        return chosen if iou is None else replace(chosen, iou_thres=iou)

    @property
    def unready(self) -> str:
        """Why it should be sent no requests now; empty where it should."""
        if self.batcher.failing:
            return "the last batch failed"
        return f"{self._active} requests are in progress" if self._active >= self.config.queue else ""

    async def answer(self, request: Request, work: Callable[[Upload], Awaitable[Response]]) -> Response:
        """Answers a request by what `work` makes of its upload; refuses it at once when too many are in progress.

        Raises:
            HTTPException: the request is refused.
        """
        upload = Upload(request, self.config.max_image_bytes)
        try:
            if self._active >= self.config.queue:
                wait = {"Retry-After": str(RETRY_AFTER_S)}
                raise HTTPException(503, f"{self._active} requests are in progress: try again later", wait)
            self._active += 1
            try:
                return await work(upload)
            finally:
                self._active -= 1
        except HTTPException:
            await upload.drain()
            raise
        except InferenceError as error:
            raise HTTPException(500, "the model failed on this image: the service's log says why") from error
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)

    async def detect_many(self, upload: Upload, nms: NMSConfig) -> Response:
        """Reads an admitted request's images and detects in them; the fault of one stands in its place."""
        clock = StageClock(self.metrics)
        files = await upload.read_many(self.config.max_images)
        clock.lap("read")
        found = await _unless_client_leaves(
            upload, asyncio.gather(*(self._one_of_many(data, nms) for _, data in files))
        )
        named = [{"name": name, **outcome} for (name, _), outcome in zip(files, found, strict=True)]
        response = JSONResponse({"images": named})
        clock.lap("inference")
        response.headers["Server-Timing"] = clock.header()
        return response

    async def _one_of_many(self, data: bytes, nms: NMSConfig) -> dict[str, Any]:
        """Returns what was found in an image file, or why nothing can be."""
        try:
            if not data:
                raise HTTPException(400, "the image is empty (0 bytes)")
            if len(data) > self.config.max_image_bytes:
                raise HTTPException(413, f"the image is larger than {self.config.max_image_mb:g} MB")
            with self.batcher.expected():
                pixels = await self._in_pool(check_upload, data, self.config.max_pixels)
                await self._pixels.take(pixels)
                try:
                    prepared, _ = await self._in_pool(self._prepare, data, nms)
                finally:
                    self._pixels.give_back(pixels)
                queued = self.batcher.enqueue(prepared)
            outcome = await queued
        except HTTPException as error:
            return {"error": error.detail}
        except InferenceError:
            return {"error": "the model failed on this image: the service's log says why"}
        return {"objects": records(outcome.detections, self.predictor.backend.names)}

    async def detect(self, upload: Upload, nms: NMSConfig, annotated: bool) -> Response:
        """Reads an admitted request's image, detects, and writes the answer.

        Pixels are taken from the budget before they are decoded, and given back when only the letterboxed image is
        left, or the annotated one is written.
        """
        clock = StageClock(self.metrics)
        with self.batcher.expected():
            data = await upload.read()
            clock.lap("read")
            pixels = await self._in_pool(check_upload, data, self.config.max_pixels)
        await _unless_client_leaves(upload, self._pixels.take(pixels))
        try:
            waited_s = clock.elapsed_s
            clock.restart()
            with self.batcher.expected():
                prepared, image = await self._in_pool(self._prepare, data, nms)
                del data
                clock.lap("decode")
                queued = self.batcher.enqueue(prepared)
            if not annotated:
                del image  # it would lie in memory as long as the request waits
                self._pixels.give_back(pixels)
                pixels = 0
            outcome = await _unless_client_leaves(upload, queued)
            clock.add("queue", waited_s + outcome.queue_s)
            clock.add("inference", outcome.inference_s)
            clock.restart()
            if annotated:
                drawn = await self._in_pool(self._annotate, image, outcome.detections)
                response = Response(drawn, media_type="image/jpeg")
            else:
                response = JSONResponse(records(outcome.detections, self.predictor.backend.names))
            clock.lap("encode")
        finally:
            self._pixels.give_back(pixels)
        response.headers["Server-Timing"] = clock.header()
        return response

    def _in_pool(self, function: Callable[..., Any], *arguments: Any) -> Coroutine[Any, Any, Any]:
        """Runs a function of pixels beside the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _prepare(self, data: bytes, nms: NMSConfig) -> tuple[Prepared, np.ndarray]:
        image = decode_upload(data)
        return Prepared(self.predictor.prepare(image), nms), image

    def _predict(self, batch: Sequence[Prepared]) -> list[Detections]:
        found = self.predictor([item.windows for item in batch], [item.nms for item in batch])
        return [detections.rounded() for detections in found]

    def _annotate(self, image: np.ndarray, detections: Detections) -> bytes:
        """Draws detections into an image (h, w, 3) BGR and returns it as JPEG."""
        if max(image.shape) > JPEG_MAX_SIDE:
            raise HTTPException(422, f"a JPEG has at most {JPEG_MAX_SIDE} px a side: ask for JSON")
        drawn = draw_detections(image, detections, self.predictor.backend.names)
        return cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def records(detections: Detections, names: dict[int, str]) -> list[dict[str, Any]]:
    """Returns detections as records of the columns that YOLOv5's hub interface has."""
    found = []
    columns = (detections.boxes_xyxy.tolist(), detections.confidences.tolist(), detections.classes.tolist())
    for box_xyxy, confidence, class_id in zip(*columns, strict=True):
        record = dict(zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy, strict=True))
        found.append(
            {**record, "confidence": round(confidence, 6), "class": class_id, "name": class_name(names, class_id)}
        )
    return found


async def _unless_client_leaves(upload: Upload, awaited: Awaitable[T]) -> T:
    """Waits for something; cancels it when the request's client leaves, or this request is cancelled.

    Raises:
        ClientDisconnect: the client left.
    """
    awaited = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(upload.wait_until_gone())
    try:
        await asyncio.wait({awaited, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            raise ClientDisconnect
        return awaited.result()
    finally:
        awaited.cancel()
        gone.cancel()


def create_app(predictor: Predictor, model: str, config: ServeConfig, hosts: TrustedHosts | None = None) -> FastAPI:
    """Makes the application.

    Args:
        predictor: the model.
        model: its name for people.
        config: what a request may ask for, and how requests are gathered.
        hosts: the names that requests may ask for; None takes this machine's own.
    """
    service = Service(predictor, config)
    app = FastAPI(title="Object detection", docs_url=None, redoc_url=None, lifespan=service.running)
    paths = (YOLOV5_ROUTE, ROUTE, BATCH_ROUTE, *OPEN_PATHS)
    keys = read_keys(config.api_keys) if config.api_keys else ()
    app.add_middleware(
        Guard,
        hosts=hosts or TrustedHosts(),
        answered=service.metrics.answered,
        paths=paths,
        max_image_bytes=config.max_image_bytes,
        keys=keys,
        open_paths=OPEN_PATHS,
    )
    backend = predictor.backend
    about = {
        "model": model,
        "runtime": type(backend).__module__.rpartition(".")[2],
        "device": backend.device,
        "classes": len(backend.names),
        "imgsz": list(predictor.shape),
        "max_image_bytes": config.max_image_bytes,
        "max_pixels": int(config.max_pixels),
    }
    lowest_conf = backend.metadata.nms.conf_thres if backend.has_nms else 0.0
    shown = {"model": model, "conf": predictor.nms.conf_thres, "lowestConf": lowest_conf}
    page, policy = build_page({**shown, "device": about["device"], "maxBytes": config.max_image_bytes, "route": ROUTE})
    policy += "; frame-ancestors 'none'"  # means nothing inside a page

    @app.exception_handler(RequestValidationError)
    async def tell_mistake(_request: Request, error: RequestValidationError) -> Response:
        """Returns FastAPI's findings about the query as one sentence."""
        found = (f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
        return JSONResponse({"detail": "; ".join(found)}, 422)

    @app.exception_handler(Exception)
    async def tell_failure(_request: Request, _error: Exception) -> Response:
        """Answers where the program itself is at fault; the server logs the error. Stands outside of `Guard`."""
        return JSONResponse({"detail": "the service failed: its log says why"}, 500, HEADERS)

    @app.post(ROUTE, openapi_extra=UPLOAD_SCHEMA)
    @app.post(YOLOV5_ROUTE, openapi_extra=UPLOAD_SCHEMA)
    async def detect(
        request: Request, conf: Fraction = None, iou: Fraction = None, annotated: bool = False
    ) -> Response:
        """Takes an image; returns its detections as JSON, or with `annotated=1` the image with them as JPEG."""
        kinds = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
        wants_image = annotated or ("image/jpeg" in kinds and "application/json" not in kinds)
        nms = service.nms(conf, iou)
        return await service.answer(request, lambda upload: service.detect(upload, nms, wants_image))

    @app.post(BATCH_ROUTE, openapi_extra=BATCH_SCHEMA)
    async def detect_batch(request: Request, conf: Fraction = None, iou: Fraction = None) -> Response:
        """Takes several images, a form field `image` each; returns each one's detections as JSON, or its fault."""
        nms = service.nms(conf, iou)
        return await service.answer(request, lambda upload: service.detect_many(upload, nms))

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """Tells whether to send requests here now: 503 while the model fails, or as many are in progress as may be."""
        reason = service.unready
        return JSONResponse({"ready": not reason, **({"reason": reason} if reason else {})}, 503 if reason else 200)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Tells whether the model works: 503 while its last batch failed."""
        status = "failing" if service.batcher.failing else "ok"
        return JSONResponse({"status": status, **about}, 200 if status == "ok" else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns the counters in Prometheus' text format."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def documentation() -> Response:
        """Returns a page about the routes."""
        body, style = build_docs(app.openapi(), bool(keys))
        return HTMLResponse(body, headers={"Content-Security-Policy": f"{HEADERS['Content-Security-Policy']}; {style}"})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        """Returns the page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app


def build_docs(schema: dict[str, Any], with_keys: bool) -> tuple[str, str]:
    """Makes a page of an OpenAPI schema, one file without outside resources; returns it and its policy on styles."""
    sections = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            rows = [("parameter", "type", "in")]
            for parameter in operation.get("parameters", ()):
                kinds = parameter["schema"].get("anyOf", [parameter["schema"]])
                bounds = " to ".join(f"{kinds[0][key]:g}" for key in ("minimum", "maximum") if key in kinds[0])
                rows.append((parameter["name"], f"{kinds[0].get('type', '')} {bounds}", parameter["in"]))
            body = " or ".join(operation.get("requestBody", {}).get("content", ()))
            example = f"curl -F {FIELD}=@photo.jpg " if method == "post" else "curl "
            example += "-H 'X-API-Key: KEY' " * (with_keys and path not in OPEN_PATHS)
            example += "-F image=@another.jpg " * (path == BATCH_ROUTE) + f"http://HOST:PORT{path}"
            sections.append(
                f"<section><h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['description'])}</p>"
                f"{f'<p>Body: {html.escape(body)}</p>' if body else ''}{html_table(rows) if len(rows) > 1 else ''}"
                f"<pre>{html.escape(example)}</pre></section>"
            )
    head = "<header><h1>Object detection</h1><p>The same for programs: <a href='/openapi.json'>/openapi.json</a></p>"
    page = fill_page("Object detection", f"{head}</header><main>{''.join(sections)}</main>")
    return page, f"style-src {hash_of(page, 'style')}; img-src data:"


def read_keys(path: str) -> tuple[bytes, ...]:
    """Reads a file of keys, one a line; empty lines and those that begin with # do not count.

    Raises:
        UserError: it cannot be read, holds none, or one that is short.
    """
    file = find_file(path, what="--api-keys")
    try:
        lines = file.read_text(encoding="ascii").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--api-keys {path}: cannot be read ({error}).") from error
    keys = [line.strip().encode() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or min(map(len, keys)) < SHORTEST_KEY:
        raise UserError(
            f"--api-keys {path}: a key of {SHORTEST_KEY} characters or more in a line is expected. Make one: "
            'python -c "import secrets; print(secrets.token_urlsafe(24))"'
        )
    return tuple(keys)
