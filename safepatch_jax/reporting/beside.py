"""Names beside the points of a picture, placed where they cover neither points nor one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from safepatch_jax.reporting.charts import escaped

_ANGLES = (0, 180, 45, 315, 135, 225, 90, 270)  # degrees, the likelier places first
_RINGS = (9, 18, 30, 45, 62, 82, 105)  # points from the middle of a marker to a name
_MARKER = 6  # points from the middle of a marker to its edge, about
_FAR = 20  # points beyond which a line ties a name to its point

Box = tuple[float, float, float, float]  # left, bottom, right, top


def along(interval: Sequence[float], number: int = 9) -> list[float]:
    """Return so many values from one end of an interval to the other, for `name_points`: a bar is
    not to be covered."""
    low, high = interval
    return [low + (high - low) * i / (number - 1) for i in range(number)]


def name_points(axis: Any, points: Sequence[tuple[float, float, str]], size: float = 8) -> None:
    """Write a name beside each point of an axis. To be called last: the layout must be known.

    Args:
      points: (x, y, name), in the units of the axis; one without a name is not to be covered.
      size: of the font.
    """
    figure = axis.get_figure(root=True)
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    marker = _MARKER * scale
    middles = [axis.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - marker, y - marker, x + marker, y + marker) for x, y in middles]
    frame = axis.get_window_extent().extents
    for (x, y, name), middle in zip(points, middles):
        if not name:
            continue
        place = {"xytext": (0, 0), "textcoords": "offset points", "va": "bottom"}
        text = axis.annotate(escaped(name), (x, y), **place, fontsize=size, zorder=8)
        text.set_bbox({"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 0.5})
        text.set_in_layout(False)
        extent = text.get_window_extent()
        others = [m for m, (*_, other) in zip(middles, points) if other and m is not middle]
        size_of = extent.width, extent.height
        angle, ring = _place(middle, *size_of, taken, frame, scale, others)
        box = _box(middle, extent.width, extent.height, angle, ring * scale)
        taken.append(box)
        text.set_position(((box[0] - middle[0]) / scale, (box[1] - middle[1]) / scale))
        if ring > _FAR:
            near = _nearest(middle, box)
            ends = axis.transData.inverted().transform([middle, near])
            axis.plot(*zip(*ends), color="#888888", linewidth=0.6, zorder=1, scalex=0, scaley=0)


def _place(
    middle: Sequence[float],
    width: float,
    height: float,
    taken: Sequence[Box],
    frame: Sequence[float],
    scale: float,
    others: Sequence[Sequence[float]],
) -> tuple[int, int]:
    """Return the angle and the ring at which a name covers least, and is no nearer to another point
    that has a name; of equals the nearest."""
    best, least = (0, _RINGS[0]), math.inf
    for ring, angle in itertools.product(_RINGS, _ANGLES):
        box = _box(middle, width, height, angle, ring * scale)
        outside = width * height - _common(box, frame)
        cost = sum(_common(box, other) for other in taken) + 3 * outside
        if any(_gap(other, box) < _gap(middle, box) - 1 for other in others):
            cost += width * height / 2
        if cost < least - 0.5:
            best, least = (angle, ring), cost
        if least <= 0.5:
            break
    return best


def _box(middle: Sequence[float], width: float, height: float, angle: int, reach: float) -> Box:
    """Return the box of a name whose nearest side or corner is `reach` away from the middle."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = middle[0] + reach * across, middle[1] + reach * up
    left = x - width * (1 - round(across, 6)) / 2 if abs(across) < 0.1 else x - width * (across < 0)
    bottom = y - height / 2 + up * height / 2
    return left, bottom, left + width, bottom + height


def _common(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the area that two boxes have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _gap(point: Sequence[float], box: Box) -> float:
    """Return how far a point is from a box."""
    return math.dist(point, _nearest(point, box))


def _nearest(middle: Sequence[float], box: Box) -> tuple[float, float]:
    """Return the point of a box that is nearest to another."""
    return min(max(middle[0], box[0]), box[2]), min(max(middle[1], box[1]), box[3])
