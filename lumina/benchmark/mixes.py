"""Sizes of the samples of a batch: what a trainer that pads pays for depends on how unequal they are."""

from lumina.data.buckets import buckets, nearest_bucket

PIXELS_PER_PATCH = 16
"""The side of a patch: 8 pixels to a latent, 2 latents to a patch."""

_SCALES_AND_ASPECTS = ((1, 1.0), (1, 2.0), (1, 0.5), (1, 4 / 3), (1, 3 / 4), (1 / 2, 1.0), (3 / 4, 1.0), (3 / 2, 1.0))
_CAPTIONS = (1, 3 / 4, 1 / 2, 1 / 4)


def patches_of(mix: str, samples: int, resolution: int) -> list[tuple[int, int]]:
    """(height, width) of each sample in patches.

    Args:
        mix: "mixed", several resolutions and aspect ratios in turn; "buckets", aspect ratios of one resolution, as the
            public recipe has them; "uniform", squares of it.
        resolution: side in pixels of the square that stands for the area.

    Raises:
        ValueError: for a resolution of fewer than two patches, or not in whole patches.
    """
    if resolution % PIXELS_PER_PATCH or resolution < 2 * PIXELS_PER_PATCH:
        raise ValueError(
            f"--resolution {resolution} cannot be cut into patches; give a multiple of {PIXELS_PER_PATCH}, at least "
            f"{2 * PIXELS_PER_PATCH}"
        )
    side = resolution // PIXELS_PER_PATCH
    match mix:
        case "uniform":
            return [(side, side)] * samples
        case "buckets":
            all_of_them = buckets(side)
            # From wide to tall in even steps, whatever the number of samples.
            return [all_of_them[(2 * i + 1) * len(all_of_them) // (2 * samples)] for i in range(samples)]
        case "mixed":
            chosen = (_SCALES_AND_ASPECTS[i % len(_SCALES_AND_ASPECTS)] for i in range(samples))
            return [_nearest(round(side * scale), aspect) for scale, aspect in chosen]
        case _:
            raise ValueError(f"--mix {mix} is unknown; it is mixed, buckets or uniform")


def caption_lengths(mix: str, samples: int, longest: int) -> tuple[int, ...]:
    """Tokens of each caption: all `longest` in a uniform batch, else that, 3/4, 1/2 and 1/4 of it in turn."""
    shares = (1,) if mix == "uniform" else _CAPTIONS
    return tuple(max(1, round(longest * shares[i % len(shares)])) for i in range(samples))


def _nearest(side: int, aspect: float) -> tuple[int, int]:
    choices = buckets(side)
    height = 1000
    return choices[int(nearest_bucket(height, round(height * aspect), choices))]
