"""What every rank of a test imports, once: ranks are forked from a process that has it, and start in no time."""

import warnings

import torch

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lumina.parallel.monitor
    import lumina.parallel.ring
    import lumina.parallel.tensor
    import lumina.parallel.ulysses
    import lumina.train.loop

# Where one rank fails the others do by themselves, but the machine may be busy: they are not to be ended before.
lumina.parallel.monitor.FAILED_SECONDS = 300.0
