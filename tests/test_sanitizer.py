"""Every attention kernel under NVIDIA's checker of memory and races."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("tool, clean", [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")])
def test_kernels_are_clean(cuda, tool, clean):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable,
               Path(__file__).with_name("sanitize_attention.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and clean in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "all cases are right" in done.stdout
