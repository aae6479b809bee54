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
                errors = measure(small(queries, 2, device="cuda"), kind, 2, dim, dtype, masked=masked, memory="sliced")
                name = f"bias: {kind}, {queries} queries, {'some keys' if masked else 'nothing'} ignored, {dtype}"
                assert_accurate(name, errors, dtype)
        for layout in (window_cases.LIDAR, window_cases.CAMERA):
            errors = measure(window_cases.border_windows(layout, [4, 3], device="cuda"), heads=1, dim=dim, dtype=dtype)
            assert_accurate(f"windows at the borders of {layout}, {dtype}", errors, dtype)
        errors = window_cases.measure(small(40, 2, device="cuda"), dim=dim, dtype=dtype, memory="sliced")
        assert_accurate(f"attention to the windows only, {dtype}", errors, dtype)
    torch.cuda.synchronize()
