"""The classic faults of public trainers, each put in for as long as a run lasts."""

from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def inject(fault: str | None, mesh):
    """`fault` by name; None for none."""
    if fault is None:
        yield
        return
    with FAULTS[fault](mesh):
        yield


def _per_rank_noise(mesh):
    """Noise from a stream of the rank's own."""
    from lumina.parallel.randomness import Randomness

    normal = Randomness.normal

    def of_rank(self, purpose, sample, shape):
        return normal(Randomness(self.seed + mesh.world.rank), purpose, sample, shape)

    return mock.patch.object(Randomness, "normal", of_rank)


def _local_kq_norm(mesh):
    """KQ-norm over the heads of the rank."""
    from lumina.parallel import tensor

    def local(values, norms):
        return [
            torch.nn.functional.layer_norm(x.float(), (x.shape[1],), norm.weight, norm.bias, norm.eps)
            for x, norm in zip(values, norms, strict=True)
        ]

    class Alone(tensor.FullWidth):
        def moments(self, local_4t):
            return local_4t

        means = moments

    return mock.patch.multiple(tensor, normalise_full_width=local, FullWidth=Alone)


def _unsummed_gradients(mesh):
    """Replicated parameters keep the gradient of the rank's own tokens."""
    from lumina.parallel import tensor

    return mock.patch.object(tensor, "sum_gradient")


def _norm_of_parts_as_replicated(mesh):
    """The norm counts what a rank has of a parameter once, as if every rank had all of it."""
    from lumina.parallel import tensor

    parallelize = tensor.parallelize_tensor

    def unmarked(model, mesh):
        parts = parallelize(model, mesh)
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False
        return parts

    return mock.patch.object(tensor, "parallelize_tensor", unmarked)


FAULTS = {
    "per-rank noise": _per_rank_noise,
    "local KQ-norm": _local_kq_norm,
    "unsummed replicated gradients": _unsummed_gradients,
    "wrong clip norm": _norm_of_parts_as_replicated,
}
