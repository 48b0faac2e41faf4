"""One sample of over 131,072 tokens, forward and backward, on one rank and on four: equal, with 1/4 of the memory."""

import time
from pathlib import Path

import pytest
import torch

from tests.parallel.workers import PATIENCE, run_ranks

# 8 frames of 128 rows of 127 patches, with nextline and nextframe tokens: a number that 4 does not divide.
SHAPE, TOKENS = (8, 1, 256, 254), 131_079


def memory(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_memory() -> int:
    """Bytes of memory that this process has held at most since `reset_peak`."""
    return memory("VmHWM")


def reset_peak() -> int:
    """Forget the peak so far; bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def long_sample(rank: int, ring: int) -> tuple[float, list[float], int, float, int]:
    """Loss and gradients, summed over ranks; bytes that forward and backward took at most; seconds; bytes swapped."""
    from lumina.config.schema import ParallelConfig
    from lumina.model.config import FlagDiTConfig
    from lumina.model.flag_dit import FlagDiT
    from lumina.model.tokens import Captions, layout_of
    from lumina.parallel.mesh import close_mesh, open_mesh
    from lumina.parallel.sequence import stretch_of
    from lumina.parallel.stage import Stage

    mesh = open_mesh(ParallelConfig(ring=ring))
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_heads": 1, "n_layers": 1, "multiple_of": 16, "in_channels": 1, "cap_feat_dim": 8}
    model = FlagDiT(FlagDiTConfig(**sizes, frames=True))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
    stage = Stage(model, range(1), mesh, recompute="selective", offload=False)

    class Pack:
        t, labels = torch.tensor([0.5]), None
        captions = Captions(torch.randn(5, 8), (5,), torch.zeros(5, dtype=torch.long))

        def __init__(self, shape: tuple[int, int, int, int]):
            self.layout = layout_of([shape], 2, True, "cpu")
            self.stretch = stretch_of(self.layout, mesh)
            rows = torch.randn(len(self.layout.kind_t), 4)
            self.x = rows[self.stretch.start : self.stretch.stop].clone()

        def loss(self) -> torch.Tensor:
            tokens = self.stretch.tokens
            return (stage(self.x, self).square().mean(1) * tokens.is_patch_t).sum() / tokens.patch_counts[0]

    Pack((1, 1, 8, 8)).loss().backward()  # what torch loads and allocates once is not what is measured
    model.zero_grad()
    pack = Pack(SHAPE)
    assert len(pack.layout.kind_t) == TOKENS
    before, started = reset_peak(), time.perf_counter()
    loss = pack.loss()
    loss.backward()
    peak, seconds = peak_memory() - before, time.perf_counter() - started
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    totals = mesh.sum([float(loss.detach()), *gradients.tolist()])
    close_mesh(mesh)
    return totals[0], totals[1:], peak, seconds, memory("VmSwap")


@pytest.mark.slow
def test_a_sample_of_131079_tokens_on_1_and_4_ranks(monkeypatch):
    # Freed tensors go back to the system at once, so that the peak is that of tensors and not of malloc.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    told = {size: run_ranks(size, long_sample, size, timeout=4 * PATIENCE, start="spawn") for size in (1, 4)}
    loss, gradients, whole, *_ = told[1][0]
    gradients = torch.tensor(gradients, dtype=torch.float64)
    for size, ranks in told.items():
        peak, seconds = max(rank[2] for rank in ranks), max(rank[3] for rank in ranks)
        print(f"{size} ranks: {peak / 2**20:.1f} MiB a rank, {peak * size / whole:.2f} of 1/P, {seconds:.0f} s")
        for found_loss, found, *_ in ranks:
            assert found_loss == pytest.approx(loss, rel=1e-5)
            apart = torch.tensor(found, dtype=torch.float64) - gradients
            assert apart.norm() < 1e-5 * gradients.norm()
    if any(rank[4] for ranks in told.values() for rank in ranks):
        pytest.skip("this machine swaps: how much memory a rank has held cannot be told, its numbers are right")
    for size, ranks in told.items():
        assert max(rank[2] for rank in ranks) * size == pytest.approx(whole, rel=0.25)
