"""Serve a trained model over HTTP: POST an image, get its objects as JSON; a page for people at `/`.

Examples:
    python serve.py --weights best.onnx                                                 # then open http://127.0.0.1:5000
    curl -F image=@photo.jpg http://127.0.0.1:5000/v1/detect                            # JSON
    curl -F image=@a.jpg -F image=@b.jpg http://127.0.0.1:5000/v1/detect/batch          # several
    curl -F image=@photo.jpg "http://127.0.0.1:5000/v1/detect?annotated=1" -o boxes.jpg # the image with its boxes
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import CommandParser, echo_options, find_weights, number, options_from, run_command
from utils.errors import UserError
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.app import ServeConfig
    from service.guard import TrustedHosts

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
SHUTDOWN_S = 30  # that requests in progress have left when the service is stopped


def build_parser() -> argparse.ArgumentParser:
    """Declares the options and the defaults' only home."""
    parser = CommandParser("serve.py", description="Serve a trained model over HTTP.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint or exported model; default: the newest runs/train/*/weights/best.pt")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), help="default: as exported, else 640")
    add("--conf-thres", type=number(float, 0, 1), default=0.25, help="confidence threshold where a request names none")
    add("--iou-thres", type=number(float, 0, 1), default=0.45, help="IoU threshold where a request names none")
    add("--max-det", type=number(int, 1), default=1000, help="maximum detections per image")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--half", action="store_true", help="half precision (CUDA only)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    add("--port", type=number(int, 0, 65535), default=5000, help="port to listen on; 0 takes a free one")
    add("--trusted-hosts", nargs="+", default=[], metavar="NAME", help="further host names to answer to; * for all")
    add("--batch-size", type=number(int, 1), default=8, help="maximum images in a batch")
    add("--batch-wait-ms", type=number(float, 0, 1000), default=5, help="maximum wait for more images of a batch")
    add("--max-image-mb", type=number(float, 0.001, 100_000), default=16, help="maximum size of an image file in MB")
    add("--max-pixels", type=number(float, 1), default=50e6, help="maximum pixels of an image")
    add("--queue", type=number(int, 1), default=64, help="maximum requests in progress; others get 503 and Retry-After")
    add("--max-images", type=number(int, 1, 1000), default=32, help="maximum images of a request to /v1/detect/batch")
    add("--api-keys", default="", metavar="FILE", help="file with a key per line, of which requests must bring one")
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
    from service.app import ServeConfig, read_keys
    from service.guard import TrustedHosts

    echo_options("serve", options)
    config = ServeConfig(**vars(options))
    if config.api_keys:
        read_keys(config.api_keys)
    listener = listen(config.host, config.port, bool(config.api_keys))  # mistakes are reported before a model is loaded
    try:
        hosts = TrustedHosts((config.host, listener.getsockname()[0]), config.trusted_hosts)
        serve_forever(build_app(config, hosts), listener)
    finally:
        listener.close()


def build_app(config: ServeConfig, hosts: TrustedHosts) -> FastAPI:
    """Loads the model and makes the application around it."""
    from models.backends import load_backend
    from models.inference.predictor import Predictor
    from service.app import create_app
    from utils.images import DEFAULT_IMGSZ, inference_hw
    from utils.nms import NMSConfig

    weights = find_weights(config.weights)
    backend = load_backend(weights, config.device, config.half)
    only_hw = None if backend.dynamic else backend.metadata.shape_hw
    own_hw = [side for side in backend.metadata.shape_hw if side]
    shape_hw = inference_hw(config.imgsz, backend.stride, only_hw, default=own_hw or DEFAULT_IMGSZ)
    backend.warm_up(*shape_hw)
    if not backend.dynamic and backend.metadata.batch < config.batch_size:
        config = replace(config, batch_size=backend.metadata.batch)
        LOGGER.info(f"the model was exported for batches of {config.batch_size}: larger ones would gain nothing")
    nms = NMSConfig(config.conf_thres, config.iou_thres, config.max_det)
    predictor = Predictor(backend, nms, shape_hw, max_batch=config.batch_size)
    return create_app(predictor, Path(weights[0]).name, config, hosts)


def listen(host: str, port: int, with_keys: bool = False) -> socket.socket:
    """Returns a socket that listens on the address.

    Raises:
        UserError: no such address, or the port is taken.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        open_to_all = "nothing is encrypted, keys included" if with_keys else "it asks for no keys and encrypts nothing"
        LOGGER.warning(
            f"WARNING: --host {host} lets other machines in, and {open_to_all}. Put the service behind a firewall or a "
            f"reverse proxy{'' if with_keys else ', or give it --api-keys'}."
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

    from service.guard import Connection

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
        signal.signal(number_, lambda _signal, _frame: None)
    LOGGER.info(f"Serving on {colorstr(f'http://{shown}:{port}')} (Ctrl-C stops)")
    uvicorn.Server(config).run(sockets=[listener])
    LOGGER.info("Stopped.")


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
