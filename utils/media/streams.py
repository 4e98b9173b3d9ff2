"""Live inputs: cameras, network streams and the screen, each read without end by a thread of its own.

What is live keeps its newest frame alone, so that detection never falls behind, and a camera's JPEG is decoded when it
is taken; a recording that is served as a stream waits instead, and loses none. A frame is handed out once, as it came:
nothing stands in for one that is missing. An input that falls silent is opened again and again, ever more seldom, for
`Patience.give_up_s`; one that ends before its time says so in a last frame, which has no image. Not here: where a frame
comes from (`utils.media.capture`), which inputs there are (`utils.media.sources`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.errors import UserError
from utils.images import ImageError, decode_image
from utils.log import LOGGER
from utils.media.capture import READ_TIMEOUT_S, Capture, Frame

FAILED_GRABS = 3  # in a row: one may be a damaged packet, more mean that nothing comes any more
WAKE_S = 0.5  # on Windows, Ctrl-C is noticed only between waits
CLOSE_S = READ_TIMEOUT_S + 1.0  # how long threads may take to end: waiting for a frame cannot be cut short


@dataclass(frozen=True)
class Patience:
    """How long silence and delay are put up with."""

    first_wait_s: float = 0.5  # before an input is opened again; doubled each time ...
    longest_wait_s: float = 10.0  # ... up to this
    give_up_s: float = 300.0  # an input that gave no frame for so long, though opened again and again, is given up
    late_s: float = 1.0  # a live frame that waited longer than this for its turn counts as late


@dataclass(frozen=True)
class LiveInput:
    """An input's name, and how to open it; it is opened in the thread that reads it, after a silence once more."""

    name: str
    open: Callable[[], Capture]  # raises UserError
    reconnects: bool = True


@dataclass
class Tally:
    """What became of an input's frames since detection began; `received` = `used` + `dropped` + the one that waits."""

    received: int = 0  # whole; of every vid_stride-th frame
    used: int = 0  # handed out
    dropped: int = 0  # a newer one came before they were handed out, or the end of the run
    late: int = 0  # of those used: longer than Patience.late_s in waiting
    undecodable: int = 0  # cut or damaged; never handed out
    reconnections: int = 0

    def __str__(self) -> str:
        return (
            f"{self.received} frames received, {self.used} used, {self.dropped} dropped for newer ones, "
            f"{self.late} late, {self.undecodable} undecodable, {self.reconnections} reconnections"
        )


class LiveSource:
    """Live inputs as a `utils.media.sources.Source`."""

    live = True

    def __init__(self, inputs: Sequence[LiveInput], vid_stride: int = 1, patience: Patience | None = None) -> None:
        """Opens all inputs and waits for the first frame of each; from then on they are read.

        Args:
            inputs: of distinct names.
            vid_stride: of every so many frames one is used, the first among them.
            patience: how long silence and delay are put up with; None for the usual.

        Raises:
            UserError: one or more cannot be opened, or give no frame; nothing is left open then.
        """
        self.inputs = [source.name for source in inputs]
        self._changed, self._stopped = threading.Condition(), threading.Event()
        shared = (vid_stride, patience or Patience(), self._changed, self._stopped)
        self._readers = [_Reader(source, *shared) for source in inputs]
        try:
            for reader in self._readers:
                reader.start()
            with self._changed:
                self._wait_until(lambda: all(reader.opened or reader.ended for reader in self._readers))
            errors = [reader.error for reader in self._readers if reader.error is not None]
            for error in errors:
                if not isinstance(error, UserError):
                    raise error
            if errors:
                raise UserError("\n".join(map(str, errors)))
        except BaseException:
            self.close()
            raise

    def read(self) -> Iterator[list[Frame]]:
        """Yields one frame of every input that has a new one, whenever one has; ends when all inputs have ended.

        The last frame of one that ended before its time has an error and no image.
        """
        readers = self._readers
        with self._changed:
            for reader in readers:
                reader.begin()
        while True:
            with self._changed:
                self._wait_until(
                    lambda: (
                        self._stopped.is_set()
                        or any(reader.has_news() for reader in readers)
                        or all(reader.ended for reader in readers)
                    )
                )
                for reader in readers:
                    if reader.error is not None:
                        raise reader.error
                taken = [reader.take(number, len(readers)) for number, reader in enumerate(readers, start=1)]
                self._changed.notify_all()  # recordings wait for their place to be free
            frames = [frame for frame in taken if frame is not None]
            if not frames:
                return
            if whole := [frame for frame in frames if self._decode(frame)]:
                yield whole

    def _decode(self, frame: Frame) -> bool:
        """Decodes a frame that came as a JPEG; returns False where that turns out to be damaged within."""
        if not isinstance(frame.image, bytes):
            return True
        try:
            frame.image = decode_image(frame.image)
            return True
        except ImageError:
            tally = self._readers[frame.file_number - 1].tally
            with self._changed:
                tally.received -= 1
                tally.used -= 1
                tally.undecodable += 1
            return False

    @property
    def tallies(self) -> list[Tally]:
        """What became of each input's frames so far; a copy."""
        with self._changed:
            return [replace(reader.tally) for reader in self._readers]

    def report(self) -> list[str]:
        """Returns a line for every input: what became of its frames, and why it ended before its time, if it did."""
        endings = [f"; {reader.ending}" if reader.ending else "" for reader in self._readers]
        return [f"{name}: {tally}{end}" for name, tally, end in zip(self.inputs, self.tallies, endings, strict=True)]

    def close(self) -> None:
        """Stops all threads and gives devices and connections back; may be called again.

        Takes as long as the slowest input takes to its next frame, CLOSE_S at most.
        """
        with self._changed:
            self._stopped.set()
            for reader in self._readers:
                reader.discard()
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for reader in filter(threading.Thread.is_alive, self._readers):
            reader.join(max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                LOGGER.warning(f"WARNING: {reader.source.name}: its driver does not answer, so it is left open")

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that the readers bring about; `changed` is held, and is again afterwards."""
        while not condition():
            self._changed.wait(WAKE_S)


class _Reader(threading.Thread):
    """Reads one input and keeps its newest frame. What has no underscore is shared: guarded by `changed`."""

    def __init__(
        self,
        source: LiveInput,
        vid_stride: int,
        patience: Patience,
        changed: threading.Condition,
        stopped: threading.Event,
    ) -> None:
        # A daemon, since a driver that never returns must not keep the program from ending; close() joins the others.
        super().__init__(name=f"stream {source.name}", daemon=True)
        self.source = source
        self._vid_stride, self._patience, self._changed, self._stopped = vid_stride, patience, changed, stopped
        self._position = self._whole = 0  # frames that came so far, and those up to the last one that came whole
        self._frame_count, self._is_recording = 0, False  # as `Capture` says
        self._lost_s: float | None = None  # since when nothing comes any more

        self.image: np.ndarray | bytes | None = None  # (h, w, 3) or a JPEG, waits to be handed out
        self.time_s = self.fps = 0.0  # as `Frame` says
        self.tally = Tally()
        self.opened = self.ended = False
        self.error: BaseException | None = None  # why it could not be opened, or what went wrong within
        self.ending = ""  # why it ended before its time
        self._reported = False  # in a frame

    def begin(self) -> None:
        """Forgets what passed while nobody could use it: a model was being loaded. A recording has waited."""
        if not self._is_recording:
            self.tally = Tally(received=int(self.image is not None))

    def has_news(self) -> bool:
        """Whether a frame waits, or something went wrong that was not reported yet."""
        return self.image is not None or self.error is not None or self._has_farewell()

    def _has_farewell(self) -> bool:
        return bool(self.ended and self.ending and not self._reported)

    def take(self, file_number: int, file_count: int) -> Frame | None:
        """Hands out the frame that waits, if one does; where none does any more, once one that says why it ended."""
        place = {"file_number": file_number, "file_count": file_count, "live": True}
        if self.image is not None:
            self.tally.used += 1
            waited_s = time.monotonic() - self.time_s
            self.tally.late += waited_s > self._patience.late_s and not self._is_recording
            image, self.image = self.image, None
            number = self.tally.used
            return Frame(self.source.name, image=image, number=number, fps=self.fps, time=self.time_s, **place)
        if self._has_farewell():
            self._reported = True
            return Frame(self.source.name, error=self.ending, time=time.monotonic(), **place)
        return None

    def discard(self) -> None:
        """Drops the frame that waits, if one does."""
        self.tally.dropped += self.image is not None
        self.image = None

    def run(self) -> None:
        """Reads until the input has ended or everything is stopped."""
        try:
            self._read_session()
            if not (self.opened or self._stopped.is_set()):
                raise UserError(f"Failed to open {self.source.name}: it answers, but sends no frame.")
            ending = self._keep_reading()
            if ending:
                self.ending = f"ended: {ending}"
                LOGGER.warning(f"WARNING: {self.source.name} {self.ending}")
        except BaseException as error:  # carried to the thread that iterates, whatever it is
            self.error = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _keep_reading(self) -> str:
        """Opens the input again whenever it falls silent; returns why it ended before its time, if it did."""
        wait_s = 0.0
        while not (self._stopped.is_set() or 0 < self._frame_count <= self._position):  # all that was declared came
            if not self.source.reconnects:
                return "it gives no frames any more"
            if self._lost_s is None:
                self._lost_s, wait_s = time.monotonic(), self._patience.first_wait_s
                LOGGER.warning(f"WARNING: {self.source.name} sends nothing any more; trying to open it again")
            if time.monotonic() - self._lost_s > self._patience.give_up_s:
                return f"it could not be opened again for {self._patience.give_up_s:g} s"
            if self._stopped.wait(wait_s):
                return ""
            wait_s = min(2 * wait_s, self._patience.longest_wait_s)
            try:
                self._read_session()
            except UserError:  # the silence was reported; how long it lasted will be
                continue
            if self._is_recording and self._lost_s is not None and not self._stopped.is_set():
                return f"only {self._whole} of its {self._frame_count} frames come"
        return ""

    def _read_session(self) -> None:
        """Opens the input and reads until nothing comes any more."""
        capture = self.source.open()
        try:
            self._frame_count, self._is_recording = capture.frame_count, capture.is_recording
            if self._is_recording:  # goes on behind the last whole frame of a recording that broke off
                self._position = self._whole
                if not all(self._grab(capture) is not None for _ in range(self._position)):
                    return
            while (damaged := self._grab(capture)) is not None:  # beyond the count too: it may be an estimate
                time_s = self._position / capture.fps if self._is_recording else time.monotonic()
                self._position += 1
                wanted = (self._position - 1) % self._vid_stride == 0
                image = capture.retrieve() if wanted else None
                with self._changed:
                    self.tally.undecodable += damaged + (wanted and image is None)
                if image is not None or not wanted:
                    self._whole = self._position
                if image is not None:
                    self._deliver(image, capture.fps, time_s)
        finally:
            capture.release()

    def _grab(self, capture: Capture) -> int | None:
        """Waits for the next frame; returns how many damaged ones came before it, None if none comes or it is over."""
        for damaged in range(FAILED_GRABS):
            if self._stopped.is_set():
                return None
            if capture.grab():
                return damaged
        return None

    def _deliver(self, image: np.ndarray | bytes, fps: float, time_s: float) -> None:
        """Puts a frame in the place of the one that waits; a recording waits until the place is free."""
        with self._changed:
            while self._is_recording and self.image is not None and not self._stopped.is_set():
                self._changed.wait()
            if self._stopped.is_set():
                return
            self.discard()
            self.tally.received += 1
            self.image, self.fps, self.time_s = image, fps, time_s
            self.opened = True
            if self._lost_s is not None:
                self.tally.reconnections += 1
                LOGGER.info(f"{self.source.name} is back after {time.monotonic() - self._lost_s:.1f} s")
                self._lost_s = None
            self._changed.notify_all()
