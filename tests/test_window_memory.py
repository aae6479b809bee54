"""The window kernels with every tensor they ask for full of NaN and of the largest integers."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import window_cases
from cmtaqr.geometry import TokenLayout

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton to test the window kernels", allow_module_level=True)


def test_poison_fills_what_asks_for_memory_and_goes_with_its_context():
    with window_cases.poisoned():
        assert torch.empty(5).isnan().all() and torch.ones(2).new_empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, window_cases.__file__, "poisoned memory"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["poisoned memory", None]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_full_size(cuda, dtype):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs Triton's compiler: unset TRITON_INTERPRET")
    windows = window_cases.random_windows(TokenLayout((128, 128), (6, 20, 50)), 2, 900, [8, 5], share=0.4, device=cuda)
    window_cases.check_poisoned_memory(cuda, windows, heads=4, dim=64, dtype=dtype)
