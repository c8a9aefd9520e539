"""`Media`, what was read from one source, and the choice of frames of a clip."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


MOST_PIXELS = 178956970  # of a frame: Pillow's limit for photos


@dataclass(frozen=True)
class Media:
    """A photo (one frame) or a clip (several, all of one size)."""

    name: str  # of the source, for display
    frames: list[Image.Image]  # RGB, upright
    times: list[float] = field(default_factory=list)  # seconds since the clip's first frame, ascending; [] for a photo
    total: int = 1  # frames that the clip has
    seconds: float = 0.0  # length of the clip
    notes: list[str] = field(default_factory=list)  # what was skipped, one message each

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    @property
    def is_clip(self) -> bool:
        """Whether it is a clip, which has times even if it has only one frame."""
        return bool(self.times)


def choose(times: Sequence[Fraction], end: Fraction, count: int) -> list[tuple[int, float]]:
    """Returns the frames shown at the middles of `count` equal spans of time: (number of the frame, its time in
    seconds).

    times: when each frame is first shown, ascending from 0; end: when the last one ends. If there are no more than
    `count` frames, all are returned. A frame that is chosen again gets the time of that middle.
    """
    if len(times) <= count:
        return [(number, float(time)) for number, time in enumerate(times)]
    chosen: list[tuple[int, float]] = []
    for i in range(count):
        middle = (2 * i + 1) * end / (2 * count)
        number = bisect_right(times, middle) - 1
        again = bool(chosen) and chosen[-1][0] == number
        chosen.append((number, float(middle if again else times[number])))
    return chosen


def timeline(starts: Sequence[Fraction | None], step: Fraction) -> list[Fraction]:
    """Returns when each frame is first shown, from 0 and never descending.

    starts: the file's times, None if it has none; step: the time between frames, where a start is missing. If the clock
    of a file starts again (joined recordings), its time continues one step later.
    """
    times: list[Fraction] = []
    offset = Fraction(0)
    for start in starts:
        before = times[-1] if times else None
        if start is None:
            time = Fraction(0) if before is None else before + step
        else:
            if before is None:
                offset = -start
            elif start + offset < before:
                offset = before + step - start
            time = start + offset
        times.append(time)
    return times
