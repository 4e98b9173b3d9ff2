"""The service's routes: an image in, boxes or a picture with boxes out; health, metrics, and one page for people.

A request is admitted (or refused at once), read within limits, decoded and letterboxed in a thread as soon as the
images of the others leave room for its pixels, queued, and answered; when its client leaves it is dropped. Not here:
the server and its options (`serve.py`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple, TypeVar

import cv2
import numpy as np
from fastapi import FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from service.batching import Batcher, InferenceError
from service.guard import HEADERS, Guard
from service.hosts import TrustedHosts
from service.metrics import CONTENT_TYPE, Metrics
from service.page import build_page
from service.predictor import Predictor, Prepared
from service.uploads import FIELD, Limits, Upload, check_upload, decode_upload
from utils.errors import UserError
from utils.nms import NMSConfig
from utils.plots.boxes import PALETTE, draw_detections

YOLOV5_ROUTE, ROUTE = "/v1/object-detection/yolov5s", "/v1/detect"
MAX_DECODERS = 4
DECODED_PIXELS = 100_000_000  # at once, over all requests: 300 MB, and as much again while boxes are drawn
JPEG_QUALITY, JPEG_MAX_SIDE = 90, 65_500  # px, the format's own
RETRY_AFTER_S = 1
CLIENT_LEFT = 499  # nobody sees it; the number that servers log by custom

T = TypeVar("T")
Share = Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)]
UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary"}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class Batching(NamedTuple):
    """How requests are gathered."""

    size: int = 8
    wait_s: float = 0.005


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
        predictor: the model.
        limits: what a request may ask for.
        batcher: the queue before the model.
        metrics: the counters.
    """

    def __init__(self, predictor: Predictor, limits: Limits, batching: Batching) -> None:
        """Prepares a service; `running` starts it."""
        self.predictor, self.limits = predictor, limits
        self._active = 0
        self.metrics = Metrics(lambda: len(self.batcher), lambda: self._active)
        counters = (self.metrics.batch, self.metrics.dropped)
        self.batcher = Batcher(predictor.detect, batching.size, batching.wait_s, *counters)
        self._pixels = Budget(max(DECODED_PIXELS, limits.pixels))
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_DECODERS), "decode")

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncIterator[None]:
        """Works for the time of the block; on leaving it finishes what is queued."""
        self.batcher.start()
        yield
        await self.batcher.close()
        self._pool.shutdown()

    async def answer(self, request: Request, nms: NMSConfig, annotated: bool) -> Response:
        """Answers a request for detection; refuses it at once when too many are in progress.

        Raises:
            HTTPException: the request is refused.
        """
        upload = Upload(request, self.limits)
        try:
            if self._active >= self.limits.requests:
                wait = {"Retry-After": str(RETRY_AFTER_S)}
                raise HTTPException(503, f"{self._active} requests are in progress: try again later", wait)
            self._active += 1
            try:
                return await self._detect(upload, nms, annotated)
            finally:
                self._active -= 1
        except HTTPException:
            await upload.drain()
            raise
        except InferenceError as error:
            raise HTTPException(500, "the model failed on this image: the service's log says why") from error
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)

    async def _detect(self, upload: Upload, nms: NMSConfig, annotated: bool) -> Response:
        """Reads an admitted request's image, detects, and writes the answer.

        Pixels are taken from the budget before they are decoded, and given back when only the letterboxed image is
        left, or the annotated one is written.
        """
        clock = StageClock(self.metrics)
        with self.batcher.expected():
            data = await upload.read()
            clock.lap("read")
            pixels = await self._in_pool(check_upload, data, self.limits)
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
                response = JSONResponse(self.predictor.records(outcome.detections))
            clock.lap("encode")
        finally:
            self._pixels.give_back(pixels)
        response.headers["Server-Timing"] = clock.header()
        return response

    def _prepare(self, data: bytes, nms: NMSConfig) -> tuple[Prepared, np.ndarray]:
        """Decodes an image; returns what the model is to see of it, and itself."""
        image = decode_upload(data)
        return self.predictor.prepare(image, nms), image

    def _in_pool(self, function: Callable[..., Any], *arguments: Any) -> Coroutine[Any, Any, Any]:
        """Runs a function of pixels beside the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _annotate(self, image: np.ndarray, detections: np.ndarray) -> bytes:
        """Draws detections (k, 6) into a picture (h, w, 3) BGR and returns it as JPEG."""
        if max(image.shape) > JPEG_MAX_SIDE:
            raise HTTPException(422, f"a JPEG has at most {JPEG_MAX_SIDE} px a side: ask for JSON")
        drawn = draw_detections(image, detections, self.predictor.backend.names)
        return cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


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


class StageClock:
    """Times the stages of one request, for the metrics and for its client."""

    def __init__(self, metrics: Metrics) -> None:
        """Starts the first stage."""
        self._metrics, self._taken_s = metrics, {}
        self.restart()

    def restart(self) -> None:
        """Starts a stage."""
        self._start_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage was started."""
        return time.monotonic() - self._start_s

    def lap(self, stage: str) -> None:
        """Ends a stage and starts the next."""
        self.add(stage, self.elapsed_s)
        self.restart()

    def add(self, stage: str, seconds: float) -> None:
        """Notes a stage that was timed elsewhere."""
        self._taken_s[stage] = seconds
        self._metrics.stage(stage, seconds)

    def header(self) -> str:
        """Returns the stages in milliseconds as a Server-Timing header."""
        return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in self._taken_s.items())


def create_app(
    predictor: Predictor,
    model: str,
    limits: Limits | None = None,
    batching: Batching | None = None,
    hosts: TrustedHosts | None = None,
) -> FastAPI:
    """Makes the application.

    Args:
        predictor: the model.
        model: its name for people.
        limits: what a request may ask for; None takes the defaults.
        batching: how requests are gathered; None takes the defaults.
        hosts: the names that requests may ask for; None takes this machine's own.
    """
    service = Service(predictor, limits or Limits(), batching or Batching())
    app = FastAPI(title="Object detection", docs_url=None, redoc_url=None, lifespan=service.running)
    counting = {"answered": service.metrics.answered, "paths": (YOLOV5_ROUTE, ROUTE, "/health", "/")}
    app.add_middleware(Guard, hosts=hosts or TrustedHosts(), **counting)
    app.add_exception_handler(RequestValidationError, _tell_mistake)
    app.add_exception_handler(Exception, _tell_failure)
    _add_detection(app, service)
    _add_information(app, service, model)
    return app


def _add_detection(app: FastAPI, service: Service) -> None:
    """Adds the routes that take an image."""

    @app.post(ROUTE, openapi_extra=UPLOAD_SCHEMA)
    @app.post(YOLOV5_ROUTE, openapi_extra=UPLOAD_SCHEMA)
    async def detect(request: Request, conf: Share = None, iou: Share = None, annotated: bool = False) -> Response:
        """Takes an image; returns its detections as JSON, or with `annotated=1` the image with them as JPEG."""
        try:
            nms = service.predictor.thresholds(conf, iou)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        return await service.answer(request, nms, annotated or _wants_picture(request))


def _add_information(app: FastAPI, service: Service, model: str) -> None:
    """Adds the routes that tell about the service."""
    predictor, limits = service.predictor, service.limits
    about = {
        "model": model,
        "runtime": type(predictor.backend).__module__.rpartition(".")[2],
        "device": predictor.backend.device,
        "classes": len(predictor.backend.names),
        "imgsz": list(predictor.shape_hw),
        "max_image_bytes": limits.image_bytes,
        "max_pixels": limits.pixels,
    }
    shown = {"conf": predictor.defaults.conf_thres, "lowestConf": predictor.lowest_conf, "palette": PALETTE}
    page = build_page(model, {**shown, "device": about["device"], "maxBytes": limits.image_bytes, "route": ROUTE})

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
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        """Returns the page."""
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})


def _wants_picture(request: Request) -> bool:
    """Whether the Accept header asks for a JPEG and not for JSON."""
    kinds = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
    return "image/jpeg" in kinds and "application/json" not in kinds


async def _tell_mistake(_request: Request, error: RequestValidationError) -> Response:
    """Returns FastAPI's findings about the query as one sentence."""
    found = (f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
    return JSONResponse({"detail": "; ".join(found)}, 422)


async def _tell_failure(_request: Request, _error: Exception) -> Response:
    """Answers where the program itself is at fault; the server logs the error. Stands outside of `Guard`."""
    return JSONResponse({"detail": "the service failed: its log says why"}, 500, HEADERS)
