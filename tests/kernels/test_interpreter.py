"""The Triton kernels without a GPU: the tests in `fused/` under Triton's interpreter, in a process of their own.

The variable must be set before Triton is imported, and for no other test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.kernels import triton_support

FOLDER = Path(__file__).parent / "fused"


@pytest.mark.slow
@pytest.mark.skipif(triton_support.triton is None, reason="Triton is for Linux")
def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(FOLDER)],
        cwd=FOLDER.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout.splitlines()[-1], run.stdout[-500:]
