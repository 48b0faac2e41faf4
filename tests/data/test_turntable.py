"""Pictures of solids, held against rays that are cast at their meshes, and the data set that is made of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lumina.data.decode import View, decode_view
from lumina.data.index import Index
from lumina.data.recipes.meshes import SHAPES as MESHES
from lumina.data.recipes.meshes import Camera, Mesh, render, turned, visible
from lumina.data.recipes.turntable import (
    BACK,
    COLOURS,
    HELD_WORDINGS,
    SHAPES,
    WORDINGS,
    caption_for,
    held_prompts,
    label_of,
    render_views,
    write_turntable,
)
from lumina.data.shard_index import KINDS
from tests.data.pictures import files

# Of polygons and polyhedra by hand: base × height, and a third of it where there is a tip.
VOLUMES = {
    "cube": 1.24**3,
    "cylinder": 10 * 0.6**2 * np.sin(2 * np.pi / 20) * 1.6,
    "cone": 10 * 0.8**2 * np.sin(2 * np.pi / 20) * 1.65 / 3,
    "pyramid": 2 * 0.92**2 * 1.55 / 3,
}
LIMITS = {"sphere": 4 / 3 * np.pi * 0.85**3, "torus": 2 * np.pi**2 * 0.7 * 0.3**2}  # what a mesh inside falls short of


def cast(mesh: Mesh, degrees: float, size: float, elevation: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which triangle a ray through the middle of each pixel meets first, or -1, and how many it meets.

    Möller and Trumbore's intersection, from a camera that is moved where `Camera` turns the scene.
    """
    angle, turn = np.radians(elevation), np.radians(degrees)
    back = np.array([0, np.sin(angle), np.cos(angle)])
    up, right = np.array([0, np.cos(angle), -np.sin(angle)]), np.array([1.0, 0, 0])
    place = 4.4 * back
    steps = ((np.arange(side) + 0.5) / side * 2 - 1) * np.tan(np.radians(16))
    rays = (steps[None, :, None] * right - steps[:, None, None] * up - back).reshape(-1, 1, 3)
    x, y, z = (size * mesh.corners).T
    corners = np.stack([x * np.cos(turn) + z * np.sin(turn), y, z * np.cos(turn) - x * np.sin(turn)], 1)
    a, b, c = (corners[mesh.triangles[:, i]] for i in range(3))
    cross = np.cross(rays, c - a)
    facing = (cross * (b - a)).sum(-1)
    u = (cross * (place - a)).sum(-1) / facing
    other = np.cross(place - a, b - a)
    v = (rays * other).sum(-1) / facing
    far = ((c - a) * other).sum(-1) / facing
    far[(u < 0) | (v < 0) | (u + v > 1)] = np.inf
    met = np.isfinite(far).sum(1).reshape(side, side)
    return np.where(np.isfinite(far.min(1)), far.argmin(1), -1).reshape(side, side), met


@pytest.mark.parametrize("shape", MESHES)
def test_meshes_are_closed_and_face_outwards(shape: str) -> None:
    mesh = MESHES[shape]()
    places, number = np.unique(mesh.corners.round(9), axis=0, return_inverse=True)
    triangles = number[mesh.triangles]
    edges = {(int(t[i]), int(t[(i + 1) % 3])) for t in triangles for i in range(3)}
    assert len(edges) == 3 * len(triangles), "no edge is run along twice the same way"
    assert all((b, a) in edges and a != b for a, b in edges), "beside each edge lies another triangle"
    a, b, c = (mesh.corners[mesh.triangles[:, i]] for i in range(3))
    volume = (a * np.cross(b, c)).sum() / 6
    if shape in VOLUMES:
        assert volume == pytest.approx(VOLUMES[shape], rel=1e-9)
    else:
        assert 0.85 * LIMITS[shape] < volume < LIMITS[shape]
    assert np.linalg.norm(places, axis=1).max() <= 1.1
    depths = mesh.corners[mesh.triangles][:, :, 2]
    assert (depths[mesh.front] > -1e-9).all()
    assert (depths[~mesh.front] < 1e-9).all()
    assert mesh.front.sum() == len(mesh.front) / 2


@pytest.mark.parametrize("shape", MESHES)
def test_the_nearest_triangle_is_the_one_that_a_ray_meets_first(shape: str) -> None:
    mesh, side, camera = MESHES[shape](), 40, Camera(27.0, side=40)
    for degrees in (13.0, 101.0):
        corners = camera.seen(1.1 * turned(mesh.corners, degrees))
        seen = visible(camera.projected(corners)[mesh.triangles], side)
        expected, met = cast(mesh, degrees, 1.1, 27.0, side)
        different = seen != expected
        assert different.mean() < 0.004, "rays along an edge belong to either side"
        assert 0.1 < (seen >= 0).mean() < 0.6
        if shape == "torus" and degrees > 90:
            assert (met == 4).sum() > 10, "one part of the ring hides another"
    border = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
    assert (border == -1).all(), "the largest fits into the picture"


def test_a_face_has_the_light_of_its_normal_and_the_paint_of_its_half() -> None:
    paint, lamp = np.array([[40.0, 80, 20], [200, 100, 50]]), np.array([-0.45, 0.6, 0.66])
    lamp /= np.sqrt((lamp**2).sum())
    background, size = np.array([7.0, 8, 9]), 0.9857
    for degrees, half in ((45.0, 1), (225.0, 0)):
        # A cube's side looks straight into a camera on the horizon.
        picture = render(MESHES["cube"](), degrees, size, paint, background, Camera(0.0, side=16))
        expected = paint[half] * (0.45 + 0.55 * lamp[2])
        np.testing.assert_array_equal(picture[8, 8], np.round(expected))
        np.testing.assert_array_equal(picture[0, 0], background)
    # Its face begins in the middle of the fourth column and of the fourth row, and covers half of their pixels.
    half_side = 0.62 * size
    assert half_side * 8 / np.tan(np.radians(16)) / (4.4 - half_side) == pytest.approx(4.5, abs=0.01)
    np.testing.assert_allclose(picture[8, 3], (expected + background) / 2, atol=0.51)
    np.testing.assert_allclose(picture[12, 8], (expected + background) / 2, atol=0.51)
    np.testing.assert_array_equal(picture[8, 2], background)


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_turn_from_view_to_view(shape: str) -> None:
    views = render_views(shape, (200, 200, 200), elevation=27.0, size=1.0, start=0.0, side=16).astype(float)[..., 0]
    half = views.sum((1, 2))
    assert half[0] > 1.5 * half[6], "the front is brighter than the back"
    left, right = views[:, :, :8].sum((1, 2)), views[:, :, 8:].sum((1, 2))
    # A quarter turn, counter-clockwise from above, brings the front to the right, three quarters to the left.
    if shape == "torus":  # which then shows its edge
        assert views[3].max(0).argmax() > 7.5 > views[9].max(0).argmax()
    else:
        assert right[3] > left[3]
        assert left[9] > 1.5 * right[9]
    # The angle can be read off the picture: the nearest of pictures at known angles is of nearly the same.
    known = np.concatenate(
        [
            render_views(shape, (200, 200, 200), elevation=27.0, size=1.0, start=start, side=16)
            for start in (0.0, 10.0, 20.0)
        ]
    )
    angles = (np.array([0, 10, 20])[:, None] + 30 * np.arange(12)).ravel()
    asked = render_views(shape, (200, 200, 200), elevation=27.0, size=1.0, start=14.0, side=16)
    distance = np.abs(asked[:, None].astype(float) - known).sum((2, 3, 4))
    error = (angles[distance.argmin(1)] - (14 + 30 * np.arange(12)) + 180) % 360 - 180
    assert np.abs(error).max() < 20
    assert np.abs(error).mean() < 7


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turntable") / "shards"
    summary = write_turntable(folder, count=72, size=16, seed=5, workers=1)
    assert (summary.samples, summary.shards) == (72, 1)
    return folder


def read_caption(caption: str) -> tuple[str, str]:
    words = set(re.findall("[a-z]+", caption))
    (shape,), (colour,) = words & set(SHAPES), words & set(COLOURS)
    return shape, colour


def test_samples_show_what_their_captions_say(objects: Path) -> None:
    index = Index.open([objects])
    assert set(index.column("frames").tolist()) == {12}
    assert set(index.column("height").tolist()) == set(index.column("width").tolist()) == {16}
    assert set(index.column("kind").tolist()) == {KINDS.index("video")}
    pairs = []
    for number in range(72):
        members = index.read(number)
        decoded = decode_view(members, View(16, 16, 12), 3)
        assert decoded.pixels.shape == (12, 3, 16, 16)
        levels = ((decoded.pixels.numpy().astype(np.float64) + 1) * 127.5).round()
        shape, colour = read_caption(decoded.caption)
        # Light and darker paint change how bright a pixel is, and not its hue.
        paint = np.array(COLOURS[colour])[:, None]
        pixels = levels.transpose(1, 0, 2, 3).reshape(3, -1)
        brightness = pixels.sum(0) / paint.sum()
        np.testing.assert_allclose(pixels, paint * brightness, atol=1.1)
        assert BACK * 0.6 < brightness.max() <= 1.01
        assert (brightness == 0).mean() > 0.4
        pairs.append((shape, colour))
        assert decoded.label == label_of(shape, colour)
        if number % 7 == 0:
            fields = json.loads(members["json"])
            again = render_views(
                shape,
                COLOURS[colour],
                elevation=fields["elevation_degrees"],
                size=fields["size"],
                start=fields["start_degrees"],
                side=16,
            )
            np.testing.assert_array_equal(levels, again.transpose(0, 3, 1, 2))
    assert all(pairs.count(pair) == 2 for pair in pairs)
    assert len(set(pairs)) == 36
    assert {label_of(*pair) for pair in pairs} == set(range(36))


def test_the_bytes_depend_on_the_seed_and_not_on_the_processes(objects: Path, tmp_path: Path) -> None:
    write_turntable(tmp_path / "again", count=6, size=16, seed=5, workers=1)
    again, first = Index.open([tmp_path / "again"]), Index.open([objects])
    assert [again.read(n) for n in range(6)] == [first.read(n) for n in range(6)]
    write_turntable(tmp_path / "other", count=6, size=16, seed=6, workers=1)
    other = Index.open([tmp_path / "other"])
    assert all(other.read(n)["npy"] != first.read(n)["npy"] for n in range(6))
    assert len(files(tmp_path / "again")) == 2


def test_held_prompts_are_new_sentences() -> None:
    trained = {caption_for("cone", "red", wording) for wording in WORDINGS}
    assert len(trained) == len(WORDINGS) > 1000
    prompts = held_prompts("cone", "red")
    assert len(set(prompts)) == len(HELD_WORDINGS) == 4
    assert not trained.intersection(prompts)
    assert {read_caption(prompt) for prompt in prompts} == {("cone", "red")}
    with pytest.raises(ValueError, match=r"one of cube, .*, not 'egg'"):
        held_prompts("egg", "red")
    with pytest.raises(ValueError, match=r"one of red, .*, not 'pink'"):
        held_prompts("cone", "pink")


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 8 × 8 pixels, not 7 × 7"):
        write_turntable(tmp_path / "out", size=7)
    with pytest.raises(ValueError, match="at least 1, not -3"):
        write_turntable(tmp_path / "out", count=-3)
    assert list(tmp_path.iterdir()) == []
