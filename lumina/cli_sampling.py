"""Options of `lumina sample`: sizes and files, guidance, composition, lengths that were not trained on, memory."""

import argparse


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add those for the size of samples and the files they become."""
    sizes = parser.add_argument_group("sizes and files")
    sizes.add_argument("--height", type=int, help="pixels (default 256; 80 of sound)")
    sizes.add_argument("--width", type=int, help="pixels (default 256); of sound, columns of 256 samples each")
    sizes.add_argument("--frames", type=int, default=1, help="frames of a video, views of an object (default 1)")
    sizes.add_argument("--channels", type=int, help="of samples that were padded in training, their own")
    sizes.add_argument(
        "--format",
        choices=("auto", "png", "mp4", "gif", "sheet", "wav"),
        default="auto",
        help="auto (default): png of one frame, mp4 of several (gif without PyAV), wav with --seconds or --vocoder; "
        "sheet: several frames on one PNG",
    )
    sizes.add_argument("--fps", type=float, metavar="R", help="frames a second of mp4 and gif (default 8)")
    sizes.add_argument("--seconds", type=float, metavar="S", help="of sound, in place of --width")
    sizes.add_argument(
        "--vocoder", metavar="DIR", help="a HiFi-GAN folder that makes the sound (default: Griffin and Lim's algorithm)"
    )


def add_composition(parser: argparse.ArgumentParser) -> None:
    """Add those for captions on regions and for one style of all samples."""
    parts = parser.add_argument_group("composition and style")
    parts.add_argument(
        "--region",
        nargs=5,
        action="append",
        default=[],
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM", "TEXT"),
        help="caption of a box, its sides as shares of the width and height from 0 to 1; may be given many times "
        "(--prompt is then for the rest)",
    )
    parts.add_argument("--share-style", action="store_true", help="all samples take the style of the first")
    parts.add_argument("--style-of", metavar="PICTURE", help="all samples take the style of a picture")
    parts.add_argument("--style-prompt", default="", metavar="TEXT", help="what the picture of --style-of shows")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add those that make sampling need less memory."""
    memory = parser.add_argument_group("memory")
    memory.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: fp32 on a CPU, else bf16)")
    memory.add_argument(
        "--cpu-offload", action="store_true", help="keep weights on the CPU, and on the GPU only those at work"
    )
    memory.add_argument("--vae-tiling", action="store_true", help="decode large pictures in overlapping tiles")
    memory.add_argument("--vae-slicing", action="store_true", help="decode one picture at a time")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add those for guidance and for lengths."""
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
