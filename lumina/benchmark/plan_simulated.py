"""`lumina plan --simulate`: plans beside the real model on tensors without values."""

from lumina.benchmark import record
from lumina.benchmark.plan_work import GIB
from lumina.planner.memory import activations_under_way, place_of
from lumina.planner.messages import total_bytes
from lumina.planner.search import Candidate, Work
from lumina.planner.traffic import Load, pass_messages


def checked(work: Work, layouts: list[Candidate]) -> str:
    """The plans of these layouts beside their simulations: ranks at both ends of the pipeline, on the same samples."""
    from lumina.benchmark.simulation import simulate
    from lumina.benchmark.throughput import latent_shape
    from lumina.model.tokens import token_count

    shape = latent_shape(work.load.lengths[0], work.sizes)
    frames, _, height, width = shape
    tokens = token_count(frames, height, width, work.sizes.patch_size, work.sizes.text_conditional)
    count = len(work.load.lengths)
    load = Load((tokens,) * count, work.load.captions)
    rows = []
    for number, one in enumerate(layouts, 1):
        config = work.config.model_copy(update={"parallel": one.parallel})
        for rank in sorted({0, work.world - 1}):
            found = simulate(config, work.sizes, work.world, rank, [shape] * count, load.captions)
            place = place_of(one.parallel, work.sizes, work.world, rank)
            planned = activations_under_way(config, work.sizes, work.world, load, place).on_device
            messages = pass_messages(work.sizes, one.parallel, work.config.precision, load, place)
            rows.append(
                (
                    number,
                    rank,
                    f"{planned / GIB:,.3f}",
                    f"{found.peak / GIB:,.3f}",
                    f"{planned / found.peak:.1%}",
                    f"{sum(found.messages.values()):,}",
                    f"{total_bytes(found.messages) / 1e9:,.3f}",
                    "the same" if messages == found.messages else f"{total_bytes(messages) / 1e9:,.3f} GB",
                )
            )
    columns = ("", "rank", "activations, GiB", "simulated", "", "messages of a pass", "GB", "planned")
    return f"simulated, with samples of {tokens:,} tokens:\n\n{record.table(columns, rows)}"
