"""Evaluation: metrics, the validation loop, COCO figures, plots and reports."""
