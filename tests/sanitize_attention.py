"""A few small cases of every attention kernel, for NVIDIA's checker of memory and races:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize_attention.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize_attention.py
"""
import os
import sys

# freed blocks go back to the driver at once, so that memcheck sees every access beyond a tensor's end
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

if not torch.cuda.is_available():
    sys.exit("needs a GPU: torch.cuda.is_available() is False")
if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("needs Triton's compiler: unset TRITON_INTERPRET")

import window_cases
from fused_cases import KINDS, measure, small

FLOOR = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


def assert_accurate(name, errors, dtype):
    for tensor, (ours, plain, largest) in errors.items():
        assert ours <= 3 * plain + FLOOR[dtype] * max(largest, 1.0), (name, tensor, ours, plain, largest)
    print("right:", name, flush=True)


if __name__ == "__main__":
    for dtype, dim in ((torch.bfloat16, 32), (torch.float16, 64), (torch.float32, 16)):
        for kind in KINDS:
            for masked, queries in ((False, 70), (True, 5)):
                windows = small(queries, 2, device="cuda")
                name = f"biased attention, {kind}, {'some keys ignored' if masked else 'all keys'}, {queries} queries, {dim} channels, {dtype}"
                assert_accurate(name, measure(windows, kind, heads=2, dim=dim, dtype=dtype, masked=masked, memory="sliced"), dtype)
        for layout in (window_cases.LIDAR, window_cases.CAMERA):
            windows = window_cases.border_windows(layout, [4, 3], device="cuda")
            assert_accurate(f"biased attention, windows at the borders of {layout}, {dtype}", measure(windows, heads=1, dim=dim, dtype=dtype), dtype)
        windows = small(40, 2, device="cuda")
        assert_accurate(f"window attention, {dim} channels, {dtype}", window_cases.measure(windows, dim=dim, dtype=dtype, memory="sliced"), dtype)
    torch.cuda.synchronize()
