"""A few small cases of every attention kernel, for NVIDIA's checker of memory and races:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize_attention.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize_attention.py

tests/test_sanitizer.py runs both.
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

from cmtaqr.attention import attention_reference, biased_attention, window_attention_reference
from cmtaqr.attention.window import window_attention
from cmtaqr.bias import LocalBias
from fused_cases import KINDS, computed, moved, random_inputs, random_mask, small
from window_cases import CAMERA, LIDAR, border_windows, in_memory

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def attend(windows, kind, mask):
    """Functions of (q, k, v, value): the kernels, and the reference. Kind 'router' attends to the windows only."""
    if kind == "router":
        return (lambda q, k, v, value: window_attention(q, k, v, windows, "triton"),
                lambda q, k, v, value: window_attention_reference(q, k, v, moved(windows, "cpu")))

    def bias(windows, value):
        return None if kind == "none" else LocalBias(windows, value, **KINDS[kind])

    blocked = None if mask is None else mask.cpu()[:, None].expand(-1, windows.seen.shape[1], -1)
    options = dict(backend="triton", key_mask=mask, layout=windows.layout)
    return (lambda q, k, v, value: biased_attention(q, k, v, bias(windows, value), **options),
            lambda q, k, v, value: attention_reference(q, k, v, bias(moved(windows, "cpu"), value), blocked))


def check(windows, kind, dim, dtype, masked=False):
    """The kernels on the GPU; float64 on the CPU, so that the checker sees little but the kernels."""
    windows = moved(windows, "cuda")
    *inputs, grad = (t.cuda() for t in random_inputs(moved(windows, "cpu"), 2, dim, dtype))
    inputs = [*(in_memory(t, "sliced") for t in inputs[:3]), inputs[3]]
    fused, exact = attend(windows, kind, random_mask(windows) if masked else None)
    used = 4 if kind in ("uniform", "gaussian", "global") else 3
    inputs = [t.detach().requires_grad_(i < used) for i, t in enumerate(inputs)]
    found = computed(inputs, grad, inputs[3], fused)
    wide = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in inputs]
    for a, b in zip(found, computed(wide, grad.cpu().double(), wide[3], exact), strict=True):
        error, largest = float((a.cpu().double() - b).abs().max()), float(b.abs().max())
        assert error <= TOLERANCE[dtype] * max(largest, 1.0), (kind, dtype, error, largest)
    print(f"right: {kind}, {windows.seen.shape[1]} queries, {dtype}{', some keys ignored' if masked else ''}", flush=True)


if __name__ == "__main__":
    for dtype, dim in ((torch.bfloat16, 32), (torch.float16, 64), (torch.float32, 16)):
        for kind in KINDS:
            check(small(70, 2), kind, dim, dtype)
            check(small(5, 2), kind, dim, dtype, masked=True)
        for layout in (LIDAR, CAMERA):
            check(border_windows(layout, [4, 3]), "uniform", dim, dtype)
        check(small(40, 2), "router", dim, dtype)
    check(small(40, 2), "router", 64, torch.bfloat16)  # as the detector has it
    for layout in (LIDAR, CAMERA):
        check(border_windows(layout, [4, 3]), "router", 64, torch.bfloat16)
    torch.cuda.synchronize()
    print("all cases are right", flush=True)
