"""Exports of a checkpoint, one file per format; `formats` lists them."""
