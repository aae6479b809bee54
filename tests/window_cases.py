"""Cases of window attention and their errors against float64.

Run as a script it prints those of the CPU, one JSON line each: all, or those that its arguments name."""
import json
import sys
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from cmtaqr.attention.window import _plan, _window_attention, _window_attention_backward, window_attention
from cmtaqr.geometry import TokenLayout, Windows

SMALL = TokenLayout((9, 12), (3, 6, 10))
NAMES = "out", "dq", "dk", "dv"


def border_windows(layout, sizes, batch=1, device="cpu"):
    """Centres at all borders and corners, beyond them and in the middle; every third map hidden; the last query sees nothing."""
    places = [(r, c) for r in (-1, 0, 0.5, 1, 2) for c in (-1, 0, 0.5, 1, 2)]
    cells = torch.zeros(batch, len(places), layout.num_maps, 2, dtype=torch.long)
    for i, place in enumerate(places):
        for m, shape in enumerate(layout.maps):
            cells[:, i, m] = torch.tensor([-1 if x < 0 else n if x > 1 else int(x * (n - 1)) for x, n in zip(place, shape)])
    seen = (torch.arange(len(places))[:, None] + torch.arange(layout.num_maps)) % 3 < 2
    seen[-1] = False
    return Windows(layout, cells.to(device), seen.expand(batch, -1, -1).to(device), (1,) * layout.num_maps).resized(sizes)


def random_windows(layout, batch, queries, sizes, share=0.5, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    cells = (torch.rand(batch, queries, layout.num_maps, 2, generator=g) * (torch.tensor(layout.maps) + 4)).long() - 2
    seen = torch.rand(batch, queries, layout.num_maps, generator=g) < share
    return Windows(layout, cells.to(device), seen.to(device), (1,) * layout.num_maps).resized(sizes)


def in_memory(t, kind):
    """The same [B, H, N, D] with another arrangement in memory."""
    if kind == "heads inside":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        wide = torch.full((*t.shape[:3], 3 * t.shape[3] + 8), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 8:8 + t.shape[3]] = t
        return wide[..., 8:8 + t.shape[3]]
    if kind == "channels outside":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t.contiguous()


@contextmanager
def poisoned():
    """Fill every tensor that asks for memory with NaN, or with the largest number where it holds integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def measure(windows, heads=2, dim=16, dtype=torch.float32, needs=(True, True, True), memory="heads inside", scale=1.0, seed=0):
    """Largest errors of output and gradients, of the kernels and of plain torch in the same dtype, against float64.

    Returns:
        {name: [error of the kernels, error of plain torch, largest exact value, bound of the terms that cancel]} of what was
        asked for; that bound is 0 but for dq and dk, sums of P (dP - delta) times a key or query: with one key in a window dP
        and delta are equal, and the exact gradient is 0. Where there is no window, values must be exactly zero, which is
        checked here.
    """
    device, (batch, queries) = windows.cells.device, windows.seen.shape[:2]
    g = torch.Generator(device).manual_seed(seed)
    lengths = queries, windows.layout.num_keys, windows.layout.num_keys, queries
    q, k, v, grad = (torch.randn(batch, heads, n, dim, device=device, generator=g).to(dtype) for n in lengths)
    q = q * scale
    grad = in_memory(grad, memory)
    results = []
    for kind in ("triton", "plain", "exact"):
        inputs = [in_memory(t.double() if kind == "exact" else t, memory).detach() for t in (q, k, v)]
        for t, need in zip(inputs, needs):
            t.requires_grad_(need)
        asked = [t for t in inputs if t.requires_grad]
        out = window_attention(*inputs, windows, "triton" if kind == "triton" else "reference")
        found = iter(torch.autograd.grad(out, asked, grad.to(out.dtype)) if asked else ())
        results.append([out.detach()] + [next(found) if t.requires_grad else None for t in inputs])
    assert all(a is None or a.dtype == dtype and a.shape == b.shape for a, b in zip(results[0], results[2]))
    idle = windows.bounds()[..., 1::2].le(windows.bounds()[..., ::2]).any(-1).all(-1)[:, None].expand(-1, heads, -1)
    assert all(torch.count_nonzero(t[idle]) == 0 for t in results[0][:2] if t is not None), "a query without windows"
    if windows.layout.num_keys * queries < 10**6:
        unused = ~windows.mask().any(1)[:, None].expand(-1, heads, -1)
        assert all(torch.count_nonzero(t[unused]) == 0 for t in results[0][2:] if t is not None), "a key in no window"
    products = float(grad.double().norm(dim=-1).max() * v.double().norm(dim=-1).max()) * dim ** -0.5
    cancelled = dict(dq=products * float(k.abs().max()), dk=products * float(q.abs().max()))
    return {name: [float((a.double() - c).abs().max()), float((b.double() - c).abs().max()), float(c.abs().max()),
                   cancelled.get(name, 0.0)] for name, a, b, c in zip(NAMES, *results) if a is not None}


def overlapping():
    """Every view sees every query."""
    windows = random_windows(SMALL, 1, 40, [4, 3])
    windows.seen[:] = True
    return windows


def empty():
    windows = random_windows(SMALL, 1, 5, [4, 3])
    windows.seen[:] = False
    return windows


LIDAR, CAMERA, TINY = TokenLayout((9, 12), None), TokenLayout(None, (2, 6, 10)), TokenLayout((3, 4), (2, 4, 3))
CASES = {
    "borders, even and odd": lambda: measure(border_windows(SMALL, [4, 5])),
    "borders, odd and even": lambda: measure(border_windows(SMALL, [3, 2])),
    "single cells": lambda: measure(border_windows(SMALL, 1), heads=1),
    "larger than the maps": lambda: measure(border_windows(TINY, [9, 12]), heads=1),
    "overlapping views": lambda: measure(overlapping(), heads=1),
    "empty": lambda: measure(empty()),
    "LiDAR alone": lambda: measure(border_windows(LIDAR, [4, 3])),
    "cameras alone": lambda: measure(border_windows(CAMERA, [4, 3])),
    "one camera": lambda: measure(border_windows(TokenLayout(None, (1, 6, 10)), [4, 3])),
    "one key": lambda: measure(random_windows(TokenLayout((1, 1), None), 1, 3, 1)),
    "one query": lambda: measure(random_windows(SMALL, 1, 1, [4, 3], share=1.0)),
    "batch 3": lambda: measure(random_windows(SMALL, 3, 18, [4, 3]), heads=1),
    "many queries": lambda: measure(random_windows(TINY, 1, 270, [2, 3]), heads=1)}


def common(**changes):
    return lambda: measure(random_windows(SMALL, 1, 20, [4, 3]), **{"heads": 1, **changes})


CASES |= {"sharp scores": common(scale=4.0), "float16": common(dtype=torch.float16), "bfloat16": common(dtype=torch.bfloat16)}
CASES |= {f"head dimension {dim}": common(dim=dim) for dim in (32, 64, 128)}
CASES |= {f"in memory: {kind}": common(heads=2, memory=kind) for kind in ("heads outside", "sliced", "channels outside")}
CASES |= {f"gradients of {wanted}": common(needs=tuple(n in wanted for n in "qkv"))
          for wanted in ("q", "k", "v", "qk", "qv", "kv", "-")}


def check_operator(device="cpu"):
    """PyTorch's checks of both operators; tracing the function as a whole and checkpointing it change no bit."""
    windows = random_windows(TINY, 1, 3, [2, 3], share=0.8, device=device)
    lengths = 3, TINY.num_keys, TINY.num_keys
    q, k, v = (torch.randn(1, n, 1, 16, device=device).transpose(1, 2).requires_grad_() for n in lengths)
    place = windows.cells, windows.seen, _plan(windows)
    torch.library.opcheck(_window_attention, (q, k, v, *place))
    with torch.no_grad():
        results = _window_attention(q, k, v, *place)
        for needs in ((True, True), (False, True), (True, False)):
            arguments = torch.ones_like(q), q.detach(), k.detach(), v.detach(), *results[1:], place[2], *needs
            torch.library.opcheck(_window_attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))

    def attend(q, k, v):
        return window_attention(q, k, v, windows, "triton")

    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    first = None
    for way in (attend, traced, lambda *t: checkpoint(attend, *t, use_reentrant=False)):
        out = way(q, k, v)
        got = out, *torch.autograd.grad(out.square().sum(), (q, k, v))
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first))


def check_second_derivatives(device="cpu"):
    """Refused in words; the first derivatives are the same where they are recorded."""
    windows = random_windows(TINY, 1, 3, [2, 3], share=0.8, device=device)
    q, k, v = (torch.randn(1, 1, n, 16, device=device).requires_grad_() for n in (3, TINY.num_keys, TINY.num_keys))
    out = window_attention(q, k, v, windows, "triton").square().sum()
    first = torch.autograd.grad(out, (q, k, v), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, (q, k, v), retain_graph=True)))
    for gradient in first:
        try:
            torch.autograd.grad(gradient.sum(), k, retain_graph=True)
        except RuntimeError as error:
            assert "no second derivatives" in str(error), error
        else:
            raise AssertionError("a second derivative was given")


def check_poisoned_memory(device="cpu", windows=None, heads=1, dim=16, dtype=torch.float32):
    """What lay in the memory that the kernels ask for changes no bit."""
    windows = random_windows(SMALL, 2, 20, [4, 3], device=device) if windows is None else windows
    lengths, g = (windows.seen.shape[1], windows.layout.num_keys, windows.layout.num_keys), torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(len(windows.cells), heads, n, dim, device=device, generator=g).to(dtype).requires_grad_() for n in lengths]
    results = []
    for context in (nullcontext(), poisoned()):
        with context:
            assert not results or torch.empty(3, device=device).isnan().all()
            out = window_attention(*inputs, windows, "triton")
            results.append([out.detach(), *torch.autograd.grad(out, inputs, inputs[0].detach())])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))


CHECKS = {"operator": check_operator, "second derivatives": check_second_derivatives, "poisoned memory": check_poisoned_memory}


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = {**CASES, **CHECKS}
    for name, case in ((name, cases[name]) for name in sys.argv[1:] or cases):
        try:
            result = case()
        except Exception as error:
            result = repr(error)
        print(json.dumps([name, result]), flush=True)
