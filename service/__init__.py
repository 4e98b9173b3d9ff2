"""The web service: an image comes in over HTTP, boxes go out. `serve.py` is its command line."""
