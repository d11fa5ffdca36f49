"""Kernels in Triton on a CPU, under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

#: It makes Python numbers of arrays with one element, which numpy 2.4 no longer allows.
IS_READY = importlib.util.find_spec("triton") is not None and np.lib.NumpyVersion(np.__version__) < "2.4.0"

needs_interpreter = pytest.mark.skipif(not IS_READY, reason="no Triton, or a numpy that its interpreter cannot use")


def interpreted(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; it finds the modules of this folder, and a warning of ours stops it."""
    places = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": places}
    # The interpreter itself does what numpy is about to forbid.
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
