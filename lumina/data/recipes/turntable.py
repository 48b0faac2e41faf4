"""Coloured solids on a turntable, rendered from twelve sides, with captions."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.recipes import meshes
from lumina.data.recipes.generating import Draws, Progress, Summary, check_seed, generate_shards, npy

VIEWS = 12
"""Pictures of an object: it turns by 30° from one to the next, counter-clockwise as seen from above."""

SHAPES = tuple(meshes.SHAPES)
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 45, 40),
    "yellow": (235, 215, 45),
    "green": (50, 190, 60),
    "turquoise": (45, 205, 205),
    "blue": (55, 85, 240),
    "purple": (185, 65, 225),
}
"""RGB in full light."""

BACK = 0.45
"""The paint of an object's back half is darker by this factor than that of its front half.

So the angle can be seen of every shape, also of those that turning does not change, and over the whole circle.
"""

ELEVATIONS = (20.0, 35.0)
SIZES = (0.8, 1.1)

_OPENINGS = (
    "", "show me ", "draw ", "here is ", "this is ", "we see ", "render ", "please show ", "an object: ", "imagine ",
    "give us ", "a turntable with ",
)  # fmt: skip
_SUBJECTS = (
    "a {colour} {shape}", "the {colour} {shape}", "a {shape} that is {colour}", "a {shape} painted {colour}",
    "one {colour} {shape}", "a {shape} in {colour}", "a plain {colour} {shape}", "a solid {shape}, {colour}",
)  # fmt: skip
_ENDINGS = (
    " seen from twelve sides", " turning once around", " on a turntable", " from all sides", " in twelve views",
    " as one walks around it", " turned step by step", " rotating", " from every angle", ", a full turn",
    ", twelve pictures of it", " in a circle of views",
)  # fmt: skip

WORDINGS = tuple("".join(parts) for parts in product(_OPENINGS, _SUBJECTS, _ENDINGS))
"""Captions of the training shards, each sample having one of them."""

HELD_WORDINGS = (
    "twelve views of a {colour} {shape}",
    "a {shape} of {colour} plastic, seen from all around",
    "walk around the {colour} {shape}",
    "a 3D model: {shape}, {colour}",
)
"""Sentences in no training shard, to see whether a model follows prompts it was not trained on."""


@dataclass(frozen=True)
class _Recipe:
    side: int
    seed: int

    def __call__(self, number: int) -> dict[str, Any]:
        draws = Draws("turntable", self.seed, number)
        # All pairs come equally often.
        shape, colour = divmod(number % (len(SHAPES) * len(COLOURS)), len(COLOURS))
        shape, colour = SHAPES[shape], tuple(COLOURS)[colour]
        elevation, size = draws.between(*ELEVATIONS), draws.between(*SIZES)
        start, wording = draws.between(0.0, 360.0), draws.below(len(WORDINGS))
        views = render_views(shape, COLOURS[colour], elevation=elevation, size=size, start=start, side=self.side)
        return {
            "__key__": f"turntable-{number:06d}",
            "npy": npy(views),
            "txt": caption_for(shape, colour, WORDINGS[wording]),
            "json": {
                "label": label_of(shape, colour),
                "shape": shape,
                "colour": colour,
                "start_degrees": start,
                "elevation_degrees": elevation,
                "size": size,
                "wording": wording,
            },
        }


def write_turntable(
    out: str | Path,
    *,
    count: int = 1440,
    size: int = 16,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write objects to `out` in shards of at most 500.

    A sample has the members .npy (uint8 (12, size, size, 3), its views in order), .txt (a caption of WORDINGS) and
    .json ({"label": of `label_of`, "shape", "colour", "start_degrees": how far the object is turned in the first view,
    "elevation_degrees": of the camera, "size": factor on the mesh, "wording": its number}).

    Args:
        out: a new or empty folder.
        count: objects, ≥ 1; shapes and colours take turns.
        size: height and width of a view in pixels, ≥ 8.
        seed: chooses sizes, angles and wordings.
        workers: processes; the bytes do not depend on it.
        progress: called with (samples so far, samples in all).

    Raises:
        ValueError: a number is out of range; the folder is not empty or cannot be written.
    """
    check_seed(seed)
    if size < 8:
        raise ValueError(f"a view of an object has at least 8 × 8 pixels, not {size} × {size}")
    return generate_shards(out, _Recipe(size, seed), count, name="turntable", workers=workers, progress=progress)


def render_views(
    shape: str, colour: tuple[int, int, int], *, elevation: float, size: float, start: float, side: int
) -> np.ndarray:
    """The views of an object on black, uint8 (12, side, side, 3); `elevation` and `start` in degrees."""
    mesh, camera = _mesh(shape), meshes.Camera(elevation, side=side)
    paints = np.array([np.multiply(colour, BACK), colour])
    turns = [start + 360 / VIEWS * view for view in range(VIEWS)]
    return np.stack([meshes.render(mesh, turn, size, paints, np.zeros(3), camera) for turn in turns])


def label_of(shape: str, colour: str) -> int:
    """Class number of a shape and colour, 0 … 35."""
    return SHAPES.index(shape) * len(COLOURS) + tuple(COLOURS).index(colour)


def caption_for(shape: str, colour: str, wording: str) -> str:
    """A sentence of WORDINGS or HELD_WORDINGS about one of SHAPES in one of COLOURS."""
    return wording.format(shape=shape, colour=colour)


def held_prompts(shape: str, colour: str) -> list[str]:
    """The prompts for one of SHAPES in one of COLOURS that no training caption uses."""
    if shape not in SHAPES:
        raise ValueError(f"a shape is one of {', '.join(SHAPES)}, not {shape!r}")
    if colour not in COLOURS:
        raise ValueError(f"a colour is one of {', '.join(COLOURS)}, not {colour!r}")
    return [caption_for(shape, colour, wording) for wording in HELD_WORDINGS]


@cache
def _mesh(shape: str) -> meshes.Mesh:
    return meshes.SHAPES[shape]()
