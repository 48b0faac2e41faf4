"""Options of `lumina sample` for guidance and for lengths that were not trained on."""

import argparse


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add them to the verb's parser."""
    parser.add_argument(
        "--guided-channels", type=int, metavar="N", help="guide the first N latent channels (default all)"
    )
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("START", "STOP"),
        help="guide at times from START to STOP only; 0 is noise, 1 is data (default 0 1)",
    )
    lengths = parser.add_argument_group("lengths not trained on", "by default chosen from sampled / trained length")
    lengths.add_argument(
        "--trained-length", type=int, metavar="TOKENS", help="where the folder does not know it, or in place of it"
    )
    lengths.add_argument(
        "--rope",
        choices=("none", "interpolate", "ntk", "time-aware"),
        help="scaling of the rotary angles (default none, or time-aware above the trained length)",
    )
    lengths.add_argument("--rope-factor", type=float, metavar="S", help="of --rope (default sampled / trained length)")
    lengths.add_argument(
        "--rope-switch", type=float, metavar="T", help="time-aware: interpolate below time T, then ntk (default 0.3)"
    )
    lengths.add_argument(
        "--proportional-attention",
        action=argparse.BooleanOptionalAction,
        help="sharpen attention with the length (default: above the trained length)",
    )
    lengths.add_argument(
        "--time-shift",
        type=float,
        metavar="M",
        help="shift of the time grid (default 1; sqrt(length / trained) above it)",
    )
