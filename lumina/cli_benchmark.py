"""`lumina benchmark`. One thin function each; torch and the rest of the house are imported inside it."""

import argparse


def add_benchmark(verbs: argparse._SubParsersAction, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add `benchmark` and what is below it."""
    benchmark = verbs.add_parser(
        "benchmark",
        help="measure operations on this machine",
        description="Measure on this machine; on a GPU if there is one.",
        example="lumina benchmark kernels --hidden 4096",
    )
    subjects = benchmark.add_subparsers(dest="subject", required=True, metavar="WHAT", parser_class=parser_class)
    _add_operations(subjects)
    _add_loader(subjects)
    _add_checkpoint(subjects)
    _add_network(subjects)
    _add_throughput(subjects)
    _add_baseline(subjects)


def _add_operations(subjects: argparse._SubParsersAction) -> None:
    fused = subjects.add_parser(
        "kernels",
        help="the fused operations, beside eager torch, torch.compile, Liger and apex",
        description="Time each fused operation, forward and backward, with the bytes that it must move and the share "
        "of the copy bandwidth that they make, beside eager torch, torch.compile and, where they are installed, "
        "liger-kernel and apex.",
        example="lumina benchmark kernels --only swiglu --hidden 4096 --out swiglu.json",
    )
    fused.add_argument("--only", nargs="+", metavar="NAME", help="operations, by name (default: all)")
    fused.add_argument(
        "--hidden", nargs="+", type=int, default=[1536, 3072, 4096], metavar="D", help="(default 1536 3072 4096)"
    )
    fused.add_argument(
        "--against", nargs="+", metavar="NAME", help="lumina, torch, compile, liger, apex (default: all that are here)"
    )
    fused.set_defaults(run=_benchmark_kernels, default_tokens="4096 32768 131072; on a CPU 1024")
    attention = subjects.add_parser(
        "attention",
        help="the attention backends, and rings of them in one process",
        description="Time every attention backend that can run here, forward and backward, on one long sample, and "
        "rings of 2, 4 and 8 blocks of the default one in this process; with errors against float64.",
        example="lumina benchmark attention --head-dim 128 --tokens 131072",
    )
    attention.add_argument("--head-dim", nargs="+", type=int, default=[96, 128], metavar="E", help="(default 96 128)")
    attention.add_argument("--heads", type=int, metavar="H", help="(default 32; on a CPU 4)")
    attention.set_defaults(run=_benchmark_attention, default_tokens="4096 … 131072; on a CPU 2048")
    for parser_of in (fused, attention):
        tokens = parser_of.get_default("default_tokens")
        parser_of.add_argument("--tokens", nargs="+", type=int, metavar="T", help=f"(default {tokens})")
        parser_of.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default bf16)")
        parser_of.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
        parser_of.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")


def _add_loader(subjects: argparse._SubParsersAction) -> None:
    loader = subjects.add_parser(
        "loader",
        help="the data loader, beside webdataset and a plain torch Dataset",
        description="Time what photographs of a megapixel cost until they are pictures of RESOLUTION² pixels to train "
        "on, by the loader, by a webdataset pipeline and by a torch Dataset of files, each in processes of its own. "
        "With --minutes, watch the loader's memory instead; with --index, how an index of N samples starts.",
        example="lumina benchmark loader --dir /tmp/photographs --workers 0 1 4 --out loader.json",
    )
    instead = loader.add_mutually_exclusive_group()
    instead.add_argument("--minutes", type=float, metavar="M", help="run for so long and say how memory goes")
    instead.add_argument("--index", type=int, metavar="N", help="measure the start with N synthetic samples")
    loader.add_argument("--images", type=int, default=2000, metavar="N", help="photographs to make (default 2000)")
    loader.add_argument("--resolution", type=int, default=256, help="a multiple of 16 pixels (default 256)")
    loader.add_argument(
        "--workers", nargs="+", type=int, default=[0, 1], metavar="N", help="(default 0 1; of --minutes the largest)"
    )
    loader.add_argument("--repeats", type=int, default=5, metavar="N", help="of each measurement (default 5)")
    loader.add_argument("--samples", type=int, default=500, metavar="N", help="pictures of a measurement (default 500)")
    loader.add_argument("--dir", help="keep what is made here, or use what is (default: a temporary folder)")
    loader.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    loader.set_defaults(run=_benchmark_loader)


def _add_checkpoint(subjects: argparse._SubParsersAction) -> None:
    checkpoint = subjects.add_parser(
        "checkpoint",
        help="saving, loading and converting, beside cp and torch.save",
        description="Time saves and loads of a model's state, hashes included, and its conversion, beside cp with "
        "fsync, torch.save and torch.load of the same bytes, with the memory that each takes.",
        example="lumina benchmark checkpoint --model 3b --state weights --dtype bf16 --dir /scratch",
    )
    checkpoint.add_argument("--model", default="600m", metavar="SIZE", help="600m (default), 3b or 7b")
    checkpoint.add_argument(
        "--state",
        choices=("training", "weights"),
        default="training",
        help="weights, EMA, moments (default)",
    )
    checkpoint.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    checkpoint.add_argument("--repeats", type=int, default=3, metavar="N", help="(default 3)")
    checkpoint.add_argument("--dir", help="where to write (default: the system's folder for temporary files)")
    checkpoint.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    checkpoint.set_defaults(run=_benchmark_checkpoint)


def _add_network(subjects: argparse._SubParsersAction) -> None:
    network = subjects.add_parser(
        "network",
        help="what ranks exchange in a second, within hosts and between every two",
        description="Measure all-reduce within each host and over all ranks, and messages between every two hosts, "
        "disjoint pairs at once. Start it as training is started: by torchrun, deepspeed, srun or mpirun; `lumina "
        "doctor --hostfile` does so by itself.",
        example="lumina benchmark network --megabytes 256 --out network.json",
    )
    network.add_argument("--megabytes", type=int, default=64, metavar="M", help="of a message, at most (default 64)")
    network.add_argument("--repeats", type=int, default=5, metavar="N", help="of each measurement (default 5)")
    network.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="each takes, at most about (default 1)"
    )
    network.add_argument("--json", action="store_true", help="print the record as one line")
    network.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    network.set_defaults(run=_benchmark_network)


def _add_throughput(subjects: argparse._SubParsersAction) -> None:
    throughput = subjects.add_parser(
        "throughput",
        help="steps of training: tokens a second, TFLOP/s, memory and time by category",
        description="Time steps of training on packs of noise, with the real model, engine and optimizer, alone or "
        "under any launcher. key=value changes whatever a configuration sets.",
        example="lumina benchmark throughput --model 600m --tokens 4096 --layout zero=1 parallel.recompute=full",
    )
    throughput.add_argument(
        "--model", nargs="+", default=["600m"], metavar="SIZE", help="600m (default), 3b, 5b, 7b; several with --sweep"
    )
    throughput.add_argument(
        "--tokens", nargs="+", default=["4096"], metavar="T", help="of a sample (default 4096); several with --sweep"
    )
    throughput.add_argument("--samples", type=int, default=1, metavar="N", help="of a pack (default 1)")
    throughput.add_argument(
        "--packs", type=int, metavar="N", help="of a replica in a step (default 1; 2 for each pipeline stage)"
    )
    throughput.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="of a caption (default 128); 0: classes, no captions"
    )
    throughput.add_argument(
        "--layout",
        nargs="+",
        default=[],
        metavar="SIZES",
        help="as tp=2,pp=2,ring=4,ulysses=2,zero=1; several with --sweep",
    )
    throughput.add_argument(
        "--sweep",
        action="append",
        choices=("layouts", "tokens", "model"),
        metavar="WHAT",
        help="layouts, tokens or model: every value that is given; of layouts, unless any is given, all that can run; "
        "again, for products",
    )
    throughput.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default bf16)")
    throughput.add_argument("--steps", type=int, default=10, metavar="N", help="that are timed (default 10)")
    throughput.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before (default 3)")
    throughput.add_argument(
        "--profile-steps", type=int, default=2, metavar="N", help="whose time is shared out (default 2; 0 for none)"
    )
    throughput.add_argument(
        "--peak", metavar="TFLOPS", help="of a device, or `measured` (default: that of the GPU's data sheet)"
    )
    throughput.add_argument("--trace", metavar="FILE", help="a new file for the trace, which Perfetto opens")
    throughput.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    throughput.add_argument("--csv", metavar="FILE", help="a new file for a line a point")
    throughput.add_argument("--plot", metavar="FILE", help="a new .png, .svg or .pdf of a sweep")
    throughput.add_argument("--compare", metavar="FILE", help="what --out wrote earlier: print ratios to it")
    throughput.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as model.n_layers=8")
    throughput.set_defaults(run=_benchmark_throughput)


def _add_baseline(subjects: argparse._SubParsersAction) -> None:
    baseline = subjects.add_parser(
        "baseline",
        help="a step of training beside a plain PyTorch one of the same model on a padded batch",
        description="Time our step of training and, in turn with it, one of the same model as it is commonly written: "
        "complex rotary embedding, norms, modulation and gates each by themselves, samples and captions filled up to "
        "the longest of the batch, attention with a mask. Both start from the same weights, and nothing is timed "
        "unless their first loss and gradient agree.",
        example="lumina benchmark baseline --mix mixed --dtype fp32 model.dim=768 model.n_layers=2 model.n_heads=16",
    )
    baseline.add_argument("--model", default="600m", metavar="SIZE", help="600m (default), 3b, 5b or 7b")
    baseline.add_argument(
        "--mix",
        choices=("mixed", "buckets", "uniform"),
        default="mixed",
        help="mixed (default): five aspect ratios from 1:2 to 2:1 and squares of 1/2, 3/4 and 3/2 of the resolution; "
        "buckets: aspect ratios from 1:4 to 4:1 of one resolution; uniform: nothing to pad",
    )
    baseline.add_argument("--resolution", type=int, default=256, help="a multiple of 16 pixels (default 256)")
    baseline.add_argument("--samples", type=int, default=8, metavar="N", help="of a batch (default 8)")
    baseline.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="of the longest caption (default 128)"
    )
    baseline.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default bf16)")
    baseline.add_argument("--steps", type=int, default=1, metavar="N", help="of each in turn (default 1)")
    baseline.add_argument("--repeats", type=int, default=7, metavar="N", help="turns that are timed (default 7)")
    baseline.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    baseline.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as model.n_layers=2")
    baseline.set_defaults(run=_benchmark_baseline)


def _benchmark_kernels(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.kernels import benchmark_kernels

    benchmark_kernels(arguments)


def _benchmark_attention(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.attention import benchmark_attention

    benchmark_attention(arguments)


def _benchmark_throughput(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.sweep import benchmark_throughput

    benchmark_throughput(arguments)


def _benchmark_baseline(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.baseline import benchmark_baseline

    benchmark_baseline(arguments)


def _benchmark_loader(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.loader import benchmark_loader

    benchmark_loader(arguments)


def _benchmark_network(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.network import benchmark_network

    benchmark_network(arguments)


def _benchmark_checkpoint(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.checkpoint import benchmark_checkpoint

    benchmark_checkpoint(arguments)
