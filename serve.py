"""Serve a trained model over HTTP: POST an image, get its objects as JSON; a page for people at `/`.

Examples:
    python serve.py --weights best.onnx                                                 # then open http://127.0.0.1:5000
    curl -F image=@photo.jpg http://127.0.0.1:5000/v1/detect                            # JSON
    curl -F image=@photo.jpg "http://127.0.0.1:5000/v1/detect?annotated=1" -o boxes.jpg # the picture with its boxes
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from service.hosts import LOCAL_HOSTS, TrustedHosts
from utils.cli import CommandParser, echo_options, find_weights, number, options_from, run_command
from utils.errors import UserError
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    from fastapi import FastAPI

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
SHUTDOWN_S = 30  # that requests in progress have left when the service is stopped
TRUSTED_HELP = "more names that requests may ask for than localhost and --host; * for all"


def build_parser() -> argparse.ArgumentParser:
    """Declares the options and the defaults' only home."""
    parser = CommandParser("serve.py", description="Serve a trained model over HTTP.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint or exported model; default: the newest runs/train/*/weights/best.pt")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), default=None, help="default: as exported")
    add("--conf-thres", type=number(float, 0, 1), default=0.25, help="confidence threshold where a request names none")
    add("--iou-thres", type=number(float, 0, 1), default=0.45, help="IoU threshold where a request names none")
    add("--max-det", type=number(int, 1), default=1000, help="most detections per image")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--half", action="store_true", help="compute in float16 (CUDA only)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    add("--port", type=number(int, 0, 65535), default=5000, help="port to listen on; 0 takes a free one")
    add("--trusted-hosts", nargs="+", default=[], metavar="NAME", help=TRUSTED_HELP)
    add("--batch-size", type=number(int, 1), default=8, help="most images in a batch")
    add("--batch-wait-ms", type=number(float, 0, 1000), default=5, help="longest wait for more images of a batch")
    add("--max-image-mb", type=number(float, 0.001, 100_000), default=16, help="largest image file in MB")
    add("--max-pixels", type=number(float, 1), default=50e6, help="most pixels in an image")
    add("--queue", type=number(int, 1), default=64, help="most requests in progress; more are told to come back")
    return parser


def run(**keywords: Any) -> None:
    """Serves from Python's main thread until interrupted: `run(weights="best.onnx", port=8000)`.

    Raises:
        UserError: what the command line would have refused.
    """
    main(options_from(build_parser(), keywords))


def main(options: argparse.Namespace) -> None:
    """Loads the model and serves it until SIGINT or SIGTERM; requests in progress are finished."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: pip install -r requirements-serve.txt")
    echo_options("serve", options)
    listener = listen(options.host, options.port)  # mistakes are told before a model is loaded
    try:
        hosts = TrustedHosts((options.host, listener.getsockname()[0]), options.trusted_hosts)
        app = build_app(options, hosts)
        serve_forever(app, listener)
    finally:
        listener.close()


def build_app(options: argparse.Namespace, hosts: TrustedHosts) -> FastAPI:
    """Loads the model and makes the application around it."""
    from models.backends import load_backend
    from service.app import Batching, create_app
    from service.predictor import Predictor
    from service.uploads import Limits
    from utils.nms import NMSConfig

    (weights,) = find_weights(options.weights)
    backend = load_backend(weights, options.device, options.half)
    nms = NMSConfig(options.conf_thres, options.iou_thres, options.max_det)
    predictor = Predictor(backend, options.imgsz, nms)
    batch_size = options.batch_size if backend.dynamic else min(options.batch_size, backend.metadata.batch)
    if batch_size < options.batch_size:
        LOGGER.info(f"the model was exported for batches of {batch_size}: larger ones would gain nothing")
    limits = Limits(int(options.max_image_mb * 2**20), int(options.max_pixels), options.queue)
    batching = Batching(batch_size, options.batch_wait_ms / 1000)
    return create_app(predictor, weights.name, limits, batching, hosts)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the address.

    Raises:
        UserError: no such address, or the port is taken.
    """
    if host not in LOCAL_HOSTS:
        LOGGER.warning(
            f"WARNING: --host {host} lets other machines in; the service knows no passwords and no encryption. "
            "Put it behind a firewall or a reverse proxy."
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, ValueError) as error:  # ValueError: what can be no name, such as one with a null byte
        taken = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        advice = "choose another --port" if taken else "give --host an address or a name of this machine"
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise UserError(f"cannot listen on {host}, port {port} ({reason}): {advice}.") from error


def serve_forever(app: FastAPI, listener: socket.socket) -> None:
    """Serves until the first SIGINT or SIGTERM, then finishes what is in progress; a second SIGINT cuts it off."""
    import uvicorn

    from service.connection import Connection

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    for number_ in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it is done: that is no error here
        signal.signal(number_, _ignore)
    LOGGER.info(f"Serving on {colorstr(f'http://{shown}:{port}')} (Ctrl-C stops)")
    uvicorn.Server(config).run(sockets=[listener])
    LOGGER.info("Stopped.")


def _ignore(_signal: int, _frame: object) -> None:
    """Does nothing at a signal."""


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
