"""`lumina plan`. Torch is imported where shapes are counted."""

import argparse


def add_plan(verbs: argparse._SubParsersAction) -> None:
    """Add `plan`."""
    plan = verbs.add_parser(
        "plan",
        help="what fits on so many devices, how fast it would be, and with which settings",
        description="Reckon every layout of so many devices that is legal: memory by category, seconds of a step by "
        "what they go to, and the settings that run it, the fastest first; and why the others do not fit. No device "
        "is used. key=value changes the model; a setting of the section `parallel` is held fixed.",
        example="lumina plan --model 7b --tokens 131072 --gpus 64 --device h100-80g",
    )
    plan.add_argument("--model", metavar="SIZE", help="600m, 3b, 5b or 7b (default)")
    plan.add_argument("--tokens", type=int, metavar="T", help="of a sample (default 4096)")
    plan.add_argument("--samples", type=int, metavar="N", help="of a pack (default 1)")
    plan.add_argument("--text-tokens", type=int, metavar="N", help="of a caption (default 128); 0: classes")
    plan.add_argument(
        "--packs",
        type=int,
        metavar="N",
        help="in a step, over all devices (default: those of 4,194,304 tokens; with --fit, one for each device)",
    )
    plan.add_argument("--gpus", type=int, metavar="N", help="devices (default 8)")
    plan.add_argument(
        "--device",
        metavar="NAME",
        help="a100-40g, a100-80g, h100-80g (default), h200-141g, b200-180g, l40s-48g; or `here`: as measured here",
    )
    plan.add_argument("--memory", type=float, metavar="GIB", help="of a device, in place of the data sheet's")
    plan.add_argument("--host-memory", type=float, metavar="GIB", help="of its host's, for each device (default 128)")
    plan.add_argument("--nodes", type=int, metavar="N", help="hosts (default: one for every 8 devices)")
    plan.add_argument(
        "--interconnect", type=float, metavar="GB/s", help="that a device sends to other hosts (default: data sheet)"
    )
    plan.add_argument(
        "--network", metavar="FILE", help="what `lumina benchmark network --out` measured, in place of data sheets"
    )
    plan.add_argument("--dtype", choices=("bf16", "fp32"), help="(default bf16)")
    plan.add_argument("--top", type=int, metavar="N", help="layouts to show (default 10)")
    plan.add_argument(
        "--fit",
        choices=("tokens", "model", "devices"),
        help="instead: the longest sample, the largest model, or the fewest devices that fit",
    )
    plan.add_argument(
        "--simulate",
        type=int,
        default=0,
        metavar="N",
        help="run the first N layouts on tensors without values, and say how far memory and messages are from the plan",
    )
    plan.add_argument(
        "--measured",
        metavar="FILE",
        help="instead: beside each row that `lumina benchmark throughput --out` wrote, what the plan says of it",
    )
    plan.add_argument(
        "--scaling",
        choices=("weak", "strong"),
        help="instead: the fastest layout on --gpus devices, on twice as many, up to 4,096, with packs of a step that "
        "grow alike or stay",
    )
    plan.add_argument("--json", action="store_true", help="print all of it as JSON")
    plan.add_argument("--out", metavar="FILE", help="a new file for all layouts, as JSON")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as model.n_layers=48")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.plan import plan

    plan(arguments)
