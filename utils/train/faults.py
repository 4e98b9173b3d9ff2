"""What is said when a run's numbers are lost."""

from __future__ import annotations

from typing import NamedTuple

from utils.checks import UserError

SHOWN_IMAGES = 8


class BatchSource(NamedTuple):
    """Where in a run a batch stands, for messages."""

    epoch: int
    index: int
    paths: list[str]


def not_finite(source: BatchSource, term: str, value: float, advice: str) -> UserError:
    """Returns the error that stops a run, naming where and on which images.

    Args:
        source: the batch; of several processes this one's part.
        term: what is not finite.
        value: what it is instead.
        advice: how to go on.
    """
    more = len(source.paths) - SHOWN_IMAGES
    images = ", ".join(source.paths[:SHOWN_IMAGES]) + (f" and {more} more" if more > 0 else "")
    return UserError(
        f"training stopped: {term} is {value} in epoch {source.epoch}, batch {source.index} (images {images}). "
        f"Check these images' labels, lower lr0 in --hyp, or use --amp off. {advice}"
    )
