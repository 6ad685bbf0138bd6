"""Labels beside their points, moved apart where they would collide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.text import Annotation

Box = tuple[float, float, float, float]  # left, bottom, right, top; pixels
Obstacle = tuple[Box, float]  # and what a square pixel of overlap costs
Point = tuple[float, float]
Line = tuple[Point, Point]
Place = tuple[float, Box]  # what it costs by itself, and where it is

# Distances (points) and directions at which a label is tried, nearest first.
RADII = (7, 11, 16, 23, 32, 44, 60, 80, 104)
DIRECTIONS = 16
LEADER_FROM = 12  # a line joins labels further away than this (points) to their point
ROUNDS = 4


@dataclass(frozen=True)
class Label:
    """What to write at a point.

    Attributes:
        x: In data coordinates.
        y: In data coordinates.
        text: The label.
        color: Its colour.
    """

    x: float
    y: float
    text: str
    color: str


def place_labels(
    axes: Axes, labels: Sequence[Label], obstacles: Sequence[Obstacle] = (), size: float = 7.5
) -> list[Annotation]:
    """Write labels near their points, apart from each other and from the obstacles.

    The axes' limits and place in the figure must be final. Each label in turn takes the cheapest
    of its places while the others stay, a few times over.

    Args:
        axes: Where to.
        labels: Labels of points within the limits.
        obstacles: Boxes to keep free if possible: markers and intervals.
        size: Of the text, in points.
    """
    scale = axes.get_figure().dpi / 72
    frame = axes.get_window_extent()
    notes = []
    for label in labels:
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            fontsize=size,
            color=label.color,
            annotation_clip=False,
            # What runs behind a label does not run through its letters.
            bbox={"fc": axes.get_facecolor(), "ec": "none", "alpha": 0.75, "pad": 0.5},
        )
        notes.append(note)
    extents = [note.get_window_extent() for note in notes]
    points: list[Point] = [tuple(axes.transData.transform((b.x, b.y))) for b in labels]
    candidates = []
    for (x, y), extent in zip(points, extents, strict=True):
        places = []
        others = [
            (o, cost) for o, cost in obstacles if not (o[0] <= x <= o[2] and o[1] <= y <= o[3])
        ]
        for radius in RADII:
            for step in range(DIRECTIONS):
                angle = 2 * math.pi * step / DIRECTIONS
                dx = math.cos(angle) * (radius * scale + extent.width / 2)
                dy = math.sin(angle) * (radius * scale + extent.height / 2)
                left, bottom = x + dx - extent.width / 2, y + dy - extent.height / 2
                box = (left, bottom, left + extent.width, bottom + extent.height)
                # The right is read first, then above; near is better than far.
                dislike = 0.25 * radius + 2 * (1 - math.cos(angle)) + (math.sin(angle) < 0)
                dislike += 1e3 * _outside(box, frame.extents)
                dislike += sum(cost * _overlap(box, o, 2) for o, cost in obstacles)
                # Beside another's marker a label would seem to be that one's.
                line = _line((x, y), box)
                dislike += sum(3 * cost for o, cost in others if _hits(line, o))
                places.append((dislike, box))
        candidates.append(sorted(places))
    chosen = _arrange(candidates, points)
    for note, (x, y), box in zip(notes, points, chosen, strict=True):
        note.set_position(((box[0] - x) / scale, (box[1] - y) / scale))
        (x1, y1), (x2, y2) = _line((x, y), box)
        if math.hypot(x2 - x1, y2 - y1) > LEADER_FROM * scale:
            axes.annotate(
                "",
                axes.transData.inverted().transform((x2, y2)),
                axes.transData.inverted().transform((x1, y1)),
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": note.get_color(), "alpha": 0.7},
            )
    return notes


def _arrange(candidates: Sequence[Sequence[Place]], points: Sequence[Point]) -> list[Box]:
    """Each label's box: the best that is found from several orders of placing them."""
    best, cheapest = [places[0][1] for places in candidates], math.inf
    by_x = sorted(range(len(points)), key=lambda i: points[i])
    for order in (by_x, by_x[::-1], list(range(len(points)))):
        chosen: dict[int, Box] = {}
        for i in order * ROUNDS:
            others = [j for j in chosen if j != i]
            boxes = [chosen[j] for j in others]
            lines = [_line(points[j], chosen[j]) for j in others]
            chosen[i] = _cheapest(candidates[i], points[i], boxes, lines)[1]
        total = 0.0
        for i, box in chosen.items():
            boxes = [other for j, other in chosen.items() if j != i]
            own = next(dislike for dislike, place in candidates[i] if place == box)
            total += own + _crowding(box, points[i], boxes, [])
        if total < cheapest:
            best, cheapest = [chosen[i] for i in range(len(points))], total
    return best


def _outside(box: Box, frame: Box) -> float:
    """Pixels by which a box leaves the frame."""
    return (
        max(0, frame[0] - box[0])
        + max(0, frame[1] - box[1])
        + max(0, box[2] - frame[2])
        + max(0, box[3] - frame[3])
    )


def _overlap(a: Box, b: Box, margin: float) -> float:
    """Area that two boxes share, in pixels, with a margin around them."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + margin
    height = min(a[3], b[3]) - max(a[1], b[1]) + margin
    return width * height if width > 0 and height > 0 else 0.0


def _line(point: Point, box: Box) -> Line:
    """From a point to the nearest place on a box."""
    x = min(max(point[0], box[0]), box[2])
    y = min(max(point[1], box[1]), box[3])
    return point, (x, y)


def _cheapest(
    places: Sequence[Place], point: Point, others: Sequence[Box], lines: Sequence[Line]
) -> Place:
    """The best of a label's places, which come with their own costs, cheapest first."""
    best = (math.inf, places[0][1])
    for dislike, box in places:
        if dislike >= best[0]:
            break
        cost = dislike + _crowding(box, point, others, lines)
        if cost < best[0]:
            best = (cost, box)
    return best


def _crowding(box: Box, point: Point, others: Sequence[Box], lines: Sequence[Line]) -> float:
    """What other labels and their lines cost a place."""
    own = _line(point, box)
    cost = sum(20 * _overlap(box, other, 4) for other in others)
    cost += sum(60.0 for other in others if _hits(own, other))
    return cost + sum(60.0 for line in lines if _hits(line, box))


def _hits(line: Line, box: Box) -> bool:
    """Whether a line runs through a box, tried at a few places along it."""
    (x1, y1), (x2, y2) = line
    for i in range(1, 12):
        x, y = x1 + (x2 - x1) * i / 12, y1 + (y2 - y1) * i / 12
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False
