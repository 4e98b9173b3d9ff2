"""Helpers: files, geometry, data, training, evaluation; nothing here knows the models."""
