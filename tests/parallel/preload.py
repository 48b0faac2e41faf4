"""What every rank of a test imports, once: ranks are forked from a process that has it, and start in no time."""

import warnings

import torch

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lumina.parallel.ring
    import lumina.parallel.tensor
    import lumina.parallel.ulysses
    import lumina.train.loop  # noqa: F401
