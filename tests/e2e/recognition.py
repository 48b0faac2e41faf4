"""Judges a digits run: are the prompted digits recognised, and are they new? Also a script.

    python tests/e2e/recognition.py runs/digits [--guidance 2.5] [--steps 20] [--json]

The judge is a support-vector machine fitted on scikit-learn's real images, independent of the model. It is fitted on
half of them to measure its own accuracy on the other half, then on all of them.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from lumina.data.recipes.digits import held_prompts
from lumina.inference.pipeline import LuminaPipeline

PER_DIGIT = 50


@dataclass(frozen=True)
class Verdict:
    """What was seen of samples (all distances are Euclidean over the 64 grey levels, each 0 to 16)."""

    samples: int
    recognised: float
    recognised_by_digit: list[float]
    judge_on_held_out_real: float
    nearest_training_median: float  # of samples to the training images
    nearest_real_median: float  # of each real image to the other real ones
    copies: float  # share of samples closer to a training image than 99 % of real images are to another
    between_seeds_median: float  # of samples of one prompt to each other


@cache
def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) grey levels 0 … 16 and the digits."""
    digits = load_digits()
    return digits.data, digits.target


@cache
def judge() -> tuple[SVC, float]:
    """The machine fitted on all real images, and its accuracy on half of them when fitted on the other half."""
    images, digits = real_digits()
    seen, held, seen_digits, held_digits = train_test_split(images, digits, test_size=0.5, random_state=0)
    accuracy = SVC(gamma=0.001, C=10).fit(seen, seen_digits).score(held, held_digits)
    return SVC(gamma=0.001, C=10).fit(images, digits), accuracy


def draw_digits(run: str, guidance: float, steps: int, per_digit: int = PER_DIGIT) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (N, 64) drawn from prompts that no training caption uses, and the digits asked for."""
    pipeline = LuminaPipeline.from_pretrained(run)
    images, asked = [], []
    for digit in range(10):
        wordings = held_prompts(digit)
        prompts = [wordings[i % len(wordings)] for i in range(per_digit)]
        generators = [torch.Generator().manual_seed(1000 * digit + i) for i in range(per_digit)]
        output = pipeline(prompts, 8, 8, 1, steps, guidance, generators)
        images += [np.asarray(image, dtype=np.float64).reshape(64) * 16 / 255 for image in output.images]
        asked += [digit] * per_digit
    return np.array(images), np.array(asked)


def nearest(points: np.ndarray, to: np.ndarray, *, others: bool = False) -> np.ndarray:
    """Distance of each point to the nearest of `to`; with `others`, of the same set, to another than itself."""
    distances = np.sqrt(((points[:, None] - to[None]) ** 2).sum(-1))
    return np.sort(distances, axis=1)[:, int(others)]


def verdict(images: np.ndarray, asked: np.ndarray) -> Verdict:
    """Judge samples against the digits that were asked for."""
    machine, accuracy = judge()
    right = machine.predict(np.round(images)) == asked
    real, _ = real_digits()
    to_training, among_real = nearest(images, real), nearest(real, real, others=True)
    between = [nearest(images[asked == d], images[asked == d], others=True) for d in range(10)]
    return Verdict(
        samples=len(images),
        recognised=float(right.mean()),
        recognised_by_digit=[float(right[asked == d].mean()) for d in range(10)],
        judge_on_held_out_real=float(accuracy),
        nearest_training_median=float(np.median(to_training)),
        nearest_real_median=float(np.median(among_real)),
        copies=float((to_training < np.quantile(among_real, 0.01)).mean()),
        between_seeds_median=float(np.median(np.concatenate(between))),
    )


def main() -> None:
    """Judge a run and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seen = asdict(verdict(*draw_digits(arguments.run, arguments.guidance, arguments.steps)))
    print(json.dumps(seen) if arguments.json else "\n".join(f"{name}: {value}" for name, value in seen.items()))


if __name__ == "__main__":
    main()
