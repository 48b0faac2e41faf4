"""Judges captions on regions, shared style and lengths not trained on, by the machine of `recognition`. Also a script.

    python tests/e2e/composing.py regions runs/digit-sheets [--guidance 2.5] [--steps 20]
    python tests/e2e/composing.py style runs/digits
    python tests/e2e/composing.py lengths runs/digits --trained-length 20

Each prints a line of JSON. All prompts are ones that no training caption uses.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lumina.data.recipes.digits import held_prompts
from lumina.inference.compose import Region
from lumina.inference.pipeline import LuminaPipeline
from lumina.inference.style import Style
from tests.e2e.recognition import judge

SIDE = 8
CANVASES = ((1, 2), (2, 1), (2, 2))
"""Rows and columns of regions, each as large as a digit."""
DRAWN_AT_ONCE = 8


def grey_of(image: Image.Image) -> np.ndarray:
    """Levels 0 … 16, as scikit-learn's digits have them."""
    return np.asarray(image, dtype=np.float64) * 16 / 255


def recognised(cells: Sequence[np.ndarray]) -> np.ndarray:
    """The digit that the machine sees in each 8 × 8 cell."""
    return judge()[0].predict(np.round(np.stack(cells).reshape(len(cells), -1)))


def generators(count: int, first: int) -> list[torch.Generator]:
    """One a sample, of seeds `first`, first + 1, …"""
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def right_regions(
    pipeline: LuminaPipeline, rows: int, columns: int, calls: int, *, regions: bool = True, **settings: object
) -> float:
    """Share of cells in which the digit is the one asked for there, other digits being asked for in the others.

    Args:
        regions: False asks for one of the digits all over, in the others' place: what a sampler without regions does.
    """
    rng, right, asked = np.random.default_rng(0), 0, 0
    for call in range(calls):
        digits = rng.choice(10, rows * columns, replace=False)
        boxes = [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)
        ]
        wanted = [held_prompts(int(digit))[call % 4] for digit in digits]
        parts = [Region(prompt, *box) for prompt, box in zip(wanted, boxes, strict=True)] if regions else []
        output = pipeline(
            "" if regions else wanted[0],
            rows * SIDE,
            columns * SIDE,
            num_images_per_prompt=DRAWN_AT_ONCE,
            generator=generators(DRAWN_AT_ONCE, 1000 * call),
            regions=parts,
            **settings,
        )
        for image in output.images:
            grey = grey_of(image)
            cells = [
                grey[y : y + SIDE, x : x + SIDE]
                for y in range(0, len(grey), SIDE)
                for x in range(0, grey.shape[1], SIDE)
            ]
            right += int((recognised(cells) == digits).sum())
            asked += len(digits)
    return right / asked


def thickness(grey: np.ndarray) -> float:
    """How dark the ink is where there is ink, which on 8 × 8 pixels is how thick strokes are: Σv² / Σv."""
    return float((grey**2).sum() / grey.sum())


def style(pipeline: LuminaPipeline, batches: int, shared: bool, **settings: object) -> tuple[float, float]:
    """Variance of the thickness within a batch of one digit, on average, and the share that is recognised."""
    variances, right = [], 0
    for batch in range(batches):
        digit = batch % 10
        prompts = [held_prompts(digit)[batch % 4]] * DRAWN_AT_ONCE
        output = pipeline(
            prompts,
            SIDE,
            SIDE,
            generator=generators(DRAWN_AT_ONCE, 1000 * batch),
            style=Style() if shared else None,
            **settings,
        )
        pictures = [grey_of(image) for image in output.images]
        variances.append(np.var([thickness(picture) for picture in pictures]))
        right += int((recognised(pictures) == digit).sum())
    return float(np.mean(variances)), right / (batches * DRAWN_AT_ONCE)


def twice_the_side(pipeline: LuminaPipeline, per_digit: int, **settings: object) -> float:
    """Share of pictures of 16 × 16 pixels, averaged down to 8 × 8, in which the digit asked for is seen."""
    right = 0
    for digit in range(10):
        prompts = [held_prompts(digit)[i % 4] for i in range(per_digit)]
        output = pipeline(prompts, 2 * SIDE, 2 * SIDE, generator=generators(per_digit, 1000 * digit), **settings)
        cells = [grey_of(image).reshape(SIDE, 2, SIDE, 2).mean((1, 3)) for image in output.images]
        right += int((recognised(cells) == digit).sum())
    return right / (10 * per_digit)


def main() -> None:
    """Judge a run and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("regions", "style", "lengths"))
    parser.add_argument("run")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--trained-length", type=int)
    arguments = parser.parse_args()
    pipeline = LuminaPipeline.from_pretrained(arguments.run)
    settings = {"guidance_scale": arguments.guidance, "num_inference_steps": arguments.steps}
    calls, seen = arguments.calls, {}
    if arguments.what == "regions":
        for rows, columns in CANVASES:
            for kind in (True, False):
                name = f"{rows}×{columns} {'regions' if kind else 'one prompt'}"
                seen[name] = right_regions(pipeline, rows, columns, calls, regions=kind, **settings)
    elif arguments.what == "style":
        for kind in (False, True):
            seen["shared" if kind else "apart"] = style(pipeline, calls, kind, **settings)
    else:
        settings["trained_length"] = arguments.trained_length
        for rope in ("none", "interpolate", "ntk", "time-aware"):
            for proportional in (False, True):
                name = f"{rope}{', proportional attention' if proportional else ''}"
                seen[name] = twice_the_side(
                    pipeline, calls, rope=rope, proportional_attention=proportional, time_shift=1.0, **settings
                )
        seen["the defaults"] = twice_the_side(pipeline, calls, **settings)
    print(json.dumps(seen, ensure_ascii=False))


if __name__ == "__main__":
    main()
