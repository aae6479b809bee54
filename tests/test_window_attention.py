"""Window attention's kernels against float64: on the CPU in Triton's interpreter, on the GPU as they are."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import window_cases
from cmtaqr.attention.reference import window_attention_reference
from cmtaqr.attention.window import window_attention
from cmtaqr.geometry import TokenLayout, Windows
from cmtaqr.router import AQRWeightGenerator
from window_cases import CASES, NAMES, SMALL, check_operator, measure, random_windows

FULL = {"bev128": (TokenLayout((128, 128), (6, 20, 50)), [8, 5]), "bev180": (TokenLayout((180, 180), (6, 40, 100)), [15, 5])}
# What a result may differ from float64 by where plain torch happens to be exact, as a share of the largest value.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def assert_accurate(errors, dtype, slack=1.0):
    """At most twice (output) or three times (gradients) the error of plain torch, and fp32's rounding of what cancels."""
    for name, (ours, plain, largest, cancelled) in errors.items():
        allowed = slack * (2 if name == "out" else 3) * plain + FLOOR[dtype] * largest + 2**-22 * cancelled
        assert ours <= allowed, (name, ours, plain, largest, cancelled)


def interpret(*arguments):
    """What Python prints with Triton's interpreter, in a process of its own: it must be chosen before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton to run its interpreter")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted():
    """Every case."""
    return dict(json.loads(line) for line in interpret(window_cases.__file__).splitlines())


@pytest.mark.parametrize("name", CASES)
def test_interpreter_agrees_with_float64(interpreted, name):
    errors = interpreted[name]
    assert isinstance(errors, dict), errors
    if name.startswith("gradients of"):
        wanted = name.split()[-1]
        assert set(errors) == {"out"} | ({f"d{n}" for n in wanted} if wanted != "-" else set())
    else:
        assert set(errors) == set(NAMES)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    # the interpreter cuts fp32 off to bfloat16 instead of rounding it, which doubles the error
    assert_accurate(errors, dtype, slack=2.0 if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("name", ["operator", "second derivatives"])
def test_operator_passes_opcheck_compiles_and_refuses(interpreted, name):
    assert interpreted[name] is None, interpreted[name]


def attention_inputs(windows, dtype=torch.float32, dim=16, heads=2):
    batch, queries = windows.seen.shape[:2]
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, dim, generator=g).to(windows.cells.device, dtype)
            for n in (queries, windows.layout.num_keys, windows.layout.num_keys)]


def test_cpu_takes_the_reference():
    windows = random_windows(SMALL, 2, 9, [4, 3])
    for dtype, dim in ((torch.float32, 16), (torch.bfloat16, 24), (torch.float64, 20)):
        q, k, v = attention_inputs(windows, dtype, dim)
        assert torch.equal(window_attention(q, k, v, windows), window_attention_reference(q, k, v, windows))


def test_autocast_decides_the_dtype():
    """As it does for `biased_attention`, also of inputs that it has in part."""
    windows = random_windows(SMALL, 2, 9, [4, 3])
    q, k, v = attention_inputs(windows)
    expected = window_attention(*(t.bfloat16() for t in (q, k, v)), windows)
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ((q, k, v), (q, k.bfloat16(), v)):
            assert torch.equal(window_attention(*inputs, windows), expected)
        assert window_attention(q.double(), k.double(), v.double(), windows).dtype == torch.float64
        with pytest.raises(ValueError, match="one floating-point dtype, got torch.float64, torch.bfloat16"):
            window_attention(q.double(), k, v, windows)


def replaced(windows, **changes):
    return Windows(**{**vars(windows), **changes})


@pytest.mark.parametrize("error, message, change", [
    (ValueError, r"backend='cuda': choose 'auto', 'triton' or 'reference'", lambda q, k, v, w: (q, k, v, w, "cuda")),
    (ValueError, r"needs q \[B, H, Q, D\] and k, v \[B, H, K, D\], got \[2, 9, 16\]", lambda q, k, v, w: (q[:, 0], k, v, w)),
    (TypeError, r"q must be a tensor, got list", lambda q, k, v, w: (q.tolist(), k, v, w)),
    (ValueError, r"needs q .* got .*\[2, 2, 288, 8\]", lambda q, k, v, w: (q, k[..., :8], v[..., :8], w)),
    (ValueError, r"\(2, 9, 288\), but q and k hold \(2, 9, 287\)", lambda q, k, v, w: (q, k[:, :, 1:], v[:, :, 1:], w)),
    (ValueError, r"\(2, 9, 288\), but q and k hold \(2, 8, 288\)", lambda q, k, v, w: (q[:, :, 1:], k, v, w)),
    (ValueError, r"\(1, 9, 288\), but q and k hold \(2, 9, 288\)",
     lambda q, k, v, w: (q, k, v, replaced(w, cells=w.cells[:1], seen=w.seen[:1]))),
    (ValueError, r"one floating-point dtype, got torch.float32, torch.float16, torch.float32",
     lambda q, k, v, w: (q, k.half(), v, w)),
    (ValueError, r"one floating-point dtype, got torch.int64", lambda q, k, v, w: (q.long(), k.long(), v.long(), w)),
    (ValueError, r"on one device, got meta, cpu, cpu, cpu \(cells\)", lambda q, k, v, w: (q.to("meta"), k, v, w)),
    (ValueError, r"on one device, .* meta \(cells\)", lambda q, k, v, w: (q, k, v, replaced(w, cells=w.cells.to("meta")))),
    (ValueError, r"cells of dtype int64 or int32 and seen of dtype bool, got torch.float32",
     lambda q, k, v, w: (q, k, v, replaced(w, cells=w.cells.float()))),
    (ValueError, r"seen of dtype bool, got torch.int64 and torch.uint8",
     lambda q, k, v, w: (q, k, v, replaced(w, seen=w.seen.byte()))),
    (TypeError, r"windows must be a cmtaqr.geometry.Windows, got Tensor", lambda q, k, v, w: (q, k, v, w.mask())),
    (RuntimeError, r"backend='triton': the kernels compute in .* got torch.float64",
     lambda q, k, v, w: (q.double(), k.double(), v.double(), w, "triton")),
    (RuntimeError, r"backend='triton': the kernels take head dimensions .* got 12",
     lambda q, k, v, w: (q[..., :12], k[..., :12], v[..., :12], w, "triton")),
])
def test_bad_input_is_refused(error, message, change):
    windows = random_windows(SMALL, 2, 9, [4, 3])
    with pytest.raises(error, match=message):
        window_attention(*change(*attention_inputs(windows), windows))


def test_triton_says_what_is_missing(monkeypatch):
    windows = random_windows(SMALL, 2, 9, [4, 3])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("cmtaqr.geometry._TRITON", True)
    with pytest.raises(RuntimeError, match="on cpu and Triton needs a GPU; TRITON_INTERPRET=1"):
        window_attention(*attention_inputs(windows), windows, backend="triton")
    monkeypatch.setattr("cmtaqr.geometry._TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
        window_attention(*attention_inputs(windows), windows, backend="triton")


LARGE_WINDOWS = """
import torch
from cmtaqr.attention.window import window_attention
from cmtaqr.geometry import TokenLayout, Windows

torch.manual_seed(0)
for layout in (TokenLayout((9, 12), None), TokenLayout((5, 4), (2, 3, 6))):
    cells = torch.randint(-40, 50, (1, 12, layout.num_maps, 2))
    cells[:, :6] = cells[:, :6] % 3                                                    # on the map
    inputs = [torch.randn(1, 1, n, 16).requires_grad_() for n in (12, layout.num_keys, layout.num_keys)]
    for size in (65536, 2**31, 2**40, 46341, 46340, 11, 12, 13, 14, 23, 24, 25, 26, 70, 71):
        windows = Windows(layout, cells, torch.ones(1, 12, layout.num_maps) > 0, (size,) * layout.num_maps)
        results = []
        for backend in ("triton", "reference"):
            out = window_attention(*inputs, windows, backend)
            results.append((out, *torch.autograd.grad(out.cos().sum(), inputs)))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert results[0][0][:, :, :6].abs().amin() > 0, size
"""


def test_windows_larger_than_the_map():
    """In the interpreter, on centres on and off the map; a loop over all cells of such a window would take hours."""
    interpret("-c", LARGE_WINDOWS)


def test_kernels_refuse_windows_whose_cells_they_cannot_count(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layout = TokenLayout((1, 50000), None)
    windows = Windows(layout, torch.zeros(1, 2, 1, 2, dtype=torch.long), torch.ones(1, 2, 1) > 0, (60000,))
    with pytest.raises(RuntimeError, match="backend='triton': the kernels take windows of at most 46340 cells, got 50000"):
        window_attention(*attention_inputs(windows), windows, backend="triton")


def test_import_needs_no_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import cmtaqr.router, cmtaqr.attention.window_benchmark as b; sys.exit(b.main([]))")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "the benchmark needs a CUDA device, and torch sees none"


def on(device, windows):
    return replaced(windows, cells=windows.cells.to(device), seen=windows.seen.to(device))


@pytest.fixture
def kernels(cuda):
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs Triton's compiler: pip install triton, without TRITON_INTERPRET")
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("name", FULL)
def test_gpu_full_size(kernels, name, dtype):
    layout, sizes = FULL[name]
    for queries, batch in ((1, 4), (63, 3), (900, 2), (1792, 1)):
        windows = random_windows(layout, batch, queries, sizes, share=0.4, seed=queries, device=kernels)
        assert_accurate(measure(windows, heads=4, dim=64, dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_gpu_small_maps(kernels, dim, dtype):
    """All borders and corners, even and odd windows, one map only, windows larger than the map, all views at once, none."""
    for layout in (SMALL, window_cases.LIDAR, window_cases.CAMERA, window_cases.TINY):
        for sizes in ([4, 5], [3, 2], [15, 8], 1):
            assert_accurate(measure(window_cases.border_windows(layout, sizes, 2, kernels), dim=dim, dtype=dtype), dtype)
    for windows in (window_cases.overlapping(), window_cases.empty()):
        assert_accurate(measure(on(kernels, windows), dim=dim, dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["heads outside", "sliced", "channels outside"])
def test_gpu_arrangements_in_memory(kernels, memory):
    windows = random_windows(SMALL, 2, 90, [8, 5], device=kernels)
    assert_accurate(measure(windows, dim=32, dtype=torch.bfloat16, memory=memory), torch.bfloat16)


@pytest.mark.gpu
def test_gpu_random_cases(kernels):
    """Layouts, windows, sizes and dtypes drawn at random."""
    g = torch.Generator().manual_seed(0)
    for case in range(300):
        def draw(low, high):
            return int(torch.randint(low, high + 1, (), generator=g))
        lidar, camera = (draw(1, 40), draw(1, 40)), (draw(1, 6), draw(1, 20), draw(1, 30))
        layout = TokenLayout(*[(lidar, camera), (lidar, camera), (lidar, None), (None, camera)][draw(0, 3)])
        sizes, share = [draw(1, 16), draw(1, 9)], draw(0, 10) / 10
        windows = random_windows(layout, draw(1, 4), draw(1, 120), sizes, share, seed=case, device=kernels)
        dtype = list(FLOOR)[case % 3]
        needs = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)][case % 4]
        assert_accurate(measure(windows, draw(1, 4), [16, 32, 64][draw(0, 2)], dtype, needs, scale=draw(1, 4), seed=case), dtype)


def gradients(windows, inputs, grad, attend=window_attention):
    out = attend(*inputs, windows)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FULL)
def test_gpu_repeats_are_bit_equal_whatever_memory_held(kernels, name):
    layout, sizes = FULL[name]
    windows = random_windows(layout, 2, 900, sizes, share=0.4, device=kernels)
    inputs = [t.requires_grad_() for t in attention_inputs(windows, torch.bfloat16, 64, 4)]
    grad = torch.randn_like(inputs[0])
    first = gradients(windows, inputs, grad)
    assert all(t.isfinite().all() for t in first)
    for _ in range(100):
        junk = [torch.full(t.shape, float("nan"), dtype=t.dtype, device=kernels) for t in (*first, *first, grad.float())]
        junk.append(torch.full((2, 8, 3, 900), -2**31 + 1, dtype=torch.int32, device=kernels))
        del junk
        assert all(torch.equal(a, b) for a, b in zip(gradients(windows, inputs, grad), first))


@pytest.mark.gpu
def test_gpu_block_sizes(kernels, monkeypatch):
    """Each variant of the sweep gives the same result."""
    from cmtaqr.attention.window_benchmark import VARIANTS
    from cmtaqr.attention.window_order import TUNING

    for change in VARIANTS:
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setitem(TUNING, name, value)
            windows = random_windows(SMALL, 2, 90, [8, 5], device=kernels)
            assert_accurate(measure(windows, dim=64, dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.gpu
def test_gpu_operator(kernels):
    check_operator(kernels)
    window_cases.check_second_derivatives(kernels)


@pytest.mark.gpu
def test_gpu_compiled_as_a_whole(kernels):
    windows = random_windows(SMALL, 2, 40, [4, 3], device=kernels)
    inputs = [t.requires_grad_() for t in attention_inputs(windows)]
    grad = torch.randn_like(inputs[0])
    compiled = torch.compile(lambda q, k, v, w: 2 * window_attention(q, k, v, w), fullgraph=True)
    got, expected = gradients(windows, inputs, grad, compiled), gradients(windows, inputs, 2 * grad)
    assert torch.equal(got[0], 2 * expected[0]) and all(torch.equal(a, b) for a, b in zip(got[1:], expected[1:]))


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_windows_and_reads_nothing_back(kernels):
    layout, sizes = FULL["bev128"]
    windows, other = (random_windows(layout, 2, 900, sizes, share=0.4, seed=seed, device=kernels) for seed in (0, 1))
    inputs = [t.requires_grad_() for t in attention_inputs(windows, torch.bfloat16, 64, 4)]
    grad = torch.randn_like(inputs[0])
    expected = gradients(other, inputs, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(windows, inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(windows, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(windows, inputs, grad)
    windows.cells.copy_(other.cells)
    windows.seen.copy_(other.seen)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_queries_times_keys(kernels):
    """Beyond output and gradients: the output in fp32, one sample's parts for every view, and 919 lists of queries."""
    layout, sizes = FULL["bev180"]
    windows = random_windows(layout, 2, 1792, sizes, share=0.4, device=kernels)
    inputs = [t.requires_grad_() for t in attention_inputs(windows, torch.bfloat16, 64, 4)]
    grad = torch.randn_like(inputs[0])
    gradients(windows, inputs, grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = gradients(windows, inputs, grad)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in results)
    assert extra < 16 * 2**20  # in the backward pass lists 6.3 MiB after parts 5.3, the output in fp32 3.5


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(kernels):
    """Keys whose addresses pass 2^31 elements."""
    layout = TokenLayout((180, 180), (6, 40, 100))
    batch, heads, dim = 5, 64, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    windows = random_windows(layout, batch, 16, [15, 5], device=kernels)
    k, v = (torch.randn(batch, layout.num_keys, heads, dim, device=kernels, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(2))
    assert k.numel() > 2**31
    q = torch.randn(batch, heads, 16, dim, device=kernels, dtype=torch.bfloat16)
    part = slice(batch - 1, batch), slice(heads - 2, heads)
    last = replaced(windows, cells=windows.cells[part[0]], seen=windows.seen[part[0]])
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = window_attention(*inputs, windows)
    found = torch.autograd.grad(out, inputs, torch.ones_like(out))
    few = [t.detach()[part].contiguous().requires_grad_() for t in inputs]
    expected = window_attention(*few, last)
    assert torch.equal(out[part], expected)
    assert all(torch.equal(a[part], b) for a, b in zip(found, torch.autograd.grad(expected, few, torch.ones_like(expected))))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_gpu_router(kernels, autocast):
    torch.manual_seed(0)
    router = AQRWeightGenerator(64, 4, 64, window_sizes=[4, 3]).eval()
    torch.nn.init.normal_(router.to_weights.weight, std=0.3)
    windows = random_windows(SMALL, 2, 30, 1)
    tokens = torch.randn(2, 30, 64), torch.randn(2, SMALL.num_keys, 64), torch.randn(2, SMALL.num_keys, 64)
    expected = router(*tokens, windows)
    loss = torch.autograd.grad(expected.square().sum(), tuple(router.parameters()))
    router.to(kernels)
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        weights = router(*(t.to(kernels) for t in tokens), on(kernels, windows))
    tolerance = 2e-3 if autocast is None else 1e-1
    torch.testing.assert_close(weights.cpu(), expected, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(weights.square().sum(), tuple(router.parameters())), loss):
        torch.testing.assert_close(a.cpu().float(), b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))
