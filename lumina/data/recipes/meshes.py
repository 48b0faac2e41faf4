"""Meshes of simple solids and their pictures: a rasteriser with a depth buffer, in NumPy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

AMBIENT = 0.45
"""Share of the light that comes from everywhere; the rest comes from a lamp."""

_LAMP = np.array([-0.45, 0.6, 0.66])  # to the right, up, and towards the camera
_LAMP /= np.linalg.norm(_LAMP)


@dataclass(frozen=True)
class Mesh:
    """A closed surface around the origin.

    Attributes:
        corners: float64 (n, 3): right, up, and towards who stands before it.
        triangles: int64 (m, 3), numbers of corners, counter-clockwise as seen from outside.
        front: bool (m,), whether a triangle belongs to the half before the plane z = 0.
    """

    corners: np.ndarray
    triangles: np.ndarray
    front: np.ndarray


def _solid(corners: np.ndarray, triangles: np.ndarray) -> Mesh:
    return Mesh(corners, triangles, corners[triangles][:, :, 2].mean(1) > 0)


def _revolved(profile: list[tuple[float, float]], around: int) -> Mesh:
    """The outline (radius, height), from its lowest point to its highest, both on the axis, turned about the vertical.

    `around`: how many corners a circle has; even, so that the plane z = 0 cuts no triangle.
    """
    angles = 2 * np.pi * np.arange(around) / around
    corners = np.array([(r * np.cos(a), y, r * np.sin(a)) for r, y in profile for a in angles])
    corner, beside = np.arange(around), (np.arange(around) + 1) % around
    triangles = []
    for ring, ((low, _), (high, _)) in enumerate(pairwise(profile)):
        a, b = ring * around + corner, ring * around + beside
        c, d = a + around, b + around
        # Rings of radius 0 are points: a band that ends in one has a triangle where others have two.
        if low > 0:
            triangles.append(np.stack([a, c, b], 1))
        if high > 0:
            triangles.append(np.stack([b, c, d], 1))
    return _solid(corners, np.concatenate(triangles))


def _sphere(radius: float, around: int, up: int) -> Mesh:
    angles = np.pi * np.arange(1, up) / up
    inner = [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]
    return _revolved([(0.0, -radius), *inner, (0.0, radius)], around)


def _torus(ring: float, tube: float, around: int, across: int) -> Mesh:
    """It stands upright, its hole towards who stands before it."""
    u, v = np.meshgrid(np.arange(around), np.arange(across), indexing="ij")
    a, b = 2 * np.pi * u / around, 2 * np.pi * v / across
    radius = ring + tube * np.cos(b)
    corners = np.stack([radius * np.cos(a), radius * np.sin(a), tube * np.sin(b)], -1).reshape(-1, 3)
    here, there = u * across + v, (u + 1) % around * across + v
    after, beyond = u * across + (v + 1) % across, (u + 1) % around * across + (v + 1) % across
    quads = [np.stack([here, there, after], -1), np.stack([after, there, beyond], -1)]
    return _solid(corners, np.concatenate([quad.reshape(-1, 3) for quad in quads]))


SHAPES: Mapping[str, Callable[[], Mesh]] = {
    "cube": lambda: _revolved(
        [(0.0, -0.62), (0.62 * math.sqrt(2), -0.62), (0.62 * math.sqrt(2), 0.62), (0.0, 0.62)], 4
    ),
    "sphere": lambda: _sphere(0.85, around=16, up=8),
    "cone": lambda: _revolved([(0.0, -0.7), (0.8, -0.7), (0.0, 0.95)], 20),
    "cylinder": lambda: _revolved([(0.0, -0.8), (0.6, -0.8), (0.6, 0.8), (0.0, 0.8)], 20),
    "torus": lambda: _torus(0.7, 0.3, around=16, across=8),
    "pyramid": lambda: _revolved([(0.0, -0.6), (0.92, -0.6), (0.0, 0.95)], 4),
}
"""Name → what makes its mesh. None is farther from the origin than 1.1."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the origin.

    Attributes:
        elevation: degrees above the horizon.
        distance: from the origin.
        field: full angle of view, degrees, up and across.
        side: height and width of the picture, pixels.
        samples: each pixel is the mean of samples × samples points.
    """

    elevation: float
    distance: float = 4.4
    field: float = 32.0
    side: int = 16
    samples: int = 4

    def seen(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 3) as the camera sees them: right, up, and towards it."""
        angle = math.radians(self.elevation)
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        return points @ turn.T

    def projected(self, seen: np.ndarray) -> np.ndarray:
        """Points (n, 3) as seen → (n, 3): column and row in pixels, 0 at the left top corner, and 1 / depth."""
        near = 1 / (self.distance - seen[:, 2])
        scale = self.side / (2 * math.tan(math.radians(self.field) / 2))
        return np.stack([self.side / 2 + scale * seen[:, 0] * near, self.side / 2 - scale * seen[:, 1] * near, near], 1)


def turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Points (n, 3) turned about the vertical axis, counter-clockwise as seen from above."""
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    return points @ np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]).T


def render(
    mesh: Mesh, degrees: float, size: float, colours: np.ndarray, background: np.ndarray, camera: Camera
) -> np.ndarray:
    """A picture of a mesh that is turned by `degrees` and scaled by `size`: uint8 (side, side, 3).

    Args:
        mesh: the shape.
        degrees: as in `turned`.
        size: factor on the corners.
        colours: float (2, 3) in 0 … 255: of the back half, and of the front half, in full light.
        background: float (3,) in 0 … 255.
        camera: where from, and how large.
    """
    corners = camera.seen(size * turned(mesh.corners, degrees))
    fine = camera.side * camera.samples
    hit = visible(camera.projected(corners)[mesh.triangles] * [camera.samples, camera.samples, 1], fine)
    a, b, c = (corners[mesh.triangles[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    light = AMBIENT + (1 - AMBIENT) * np.maximum(normals @ _LAMP, 0)
    paint = np.concatenate([np.asarray(colours)[mesh.front.astype(int)] * light[:, None], np.asarray(background)[None]])
    picture = paint[hit].reshape(camera.side, camera.samples, camera.side, camera.samples, 3).mean((1, 3))
    return np.round(picture).astype(np.uint8)


def visible(projected: np.ndarray, side: int) -> np.ndarray:
    """Which triangle is nearest at the middle of each pixel: int64 (side, side), -1 where there is none.

    Args:
        projected: (m, 3, 3), of each triangle three corners, as `Camera.projected` gives them for `side` pixels.
            Triangles that turn their back are not seen.
        side: of the picture, pixels.
    """
    x, y, near = np.moveaxis(projected, 2, 0)
    # Rows go down, so that what is counter-clockwise to the eye has a negative area here.
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    facing = np.flatnonzero(area < 0)
    x, y, near, area = x[facing], y[facing], near[facing], area[facing]
    middles = np.arange(side) + 0.5
    left, right = np.searchsorted(middles, x.min(1)), np.searchsorted(middles, x.max(1))
    top, bottom = np.searchsorted(middles, y.min(1)), np.searchsorted(middles, y.max(1))
    # All pixels of the rectangles around all triangles, in a row: a loop over triangles takes five times as long.
    counts = (right - left) * (bottom - top)
    which = np.repeat(np.arange(len(facing)), counts)
    place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    row, column = top[which] + place // (right - left)[which], left[which] + place % (right - left)[which]
    across, down = [middles[column] - x[which, i] for i in range(3)], [middles[row] - y[which, i] for i in range(3)]
    shares = [(across[j] * down[k] - across[k] * down[j]) / area[which] for j, k in ((1, 2), (2, 0), (0, 1))]
    inside = (shares[0] >= 0) & (shares[1] >= 0) & (shares[2] >= 0)
    # 1 / depth is linear in the picture, as depth itself is not.
    depth = sum(share * near[which, i] for i, share in enumerate(shares))[inside]
    pixel, triangle = (row * side + column)[inside], facing[which[inside]]
    order = np.lexsort((depth, pixel))
    last = np.append(np.diff(pixel[order]) > 0, np.ones(min(1, len(order)), bool))
    nearest = np.full(side * side, -1, np.int64)
    nearest[pixel[order][last]] = triangle[order][last]
    return nearest.reshape(side, side)
