"""The kernel of `cmtaqr.cells` gives the bits of plain torch: in Triton's interpreter on the CPU, on the GPU as it is."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmtaqr.bias import AttentionBiasGenerator
from cmtaqr.geometry import query_windows

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton to test its kernels", allow_module_level=True)

import cell_cases  # noqa: E402
from cell_cases import CASES, LAYOUTS, check, scene  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def interpreted():
    """Every case, by Triton's interpreter in a process of its own: it must be chosen before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command, folder = [sys.executable, "-W", "ignore::RuntimeWarning", cell_cases.__file__], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_interpreter_gives_the_same_bits(interpreted, name):
    result = interpreted[name]
    if name in ("strides", "operator", "no query"):
        assert result in (None, 0)
    else:
        assert isinstance(result, int) and result > 0, result


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler: unset TRITON_INTERPRET")
@pytest.mark.parametrize("metres, pixels", [("fp32", "fp64"), ("fp32", "fp32"), ("fp64", "fp64")])
def test_compiled_code_rounds_every_operation(metres, pixels):
    """The code for a GPU holds no fused multiply-add and no approximate division, whatever machine compiles it."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cmtaqr.cells import _STRIDES, _cells_kernel

    types = dict(fp32=tl.float32, fp64=tl.float64)
    constants = dict(BEV_ROWS=128, BEV_COLS=128, X_MIN=-54.0, Y_MIN=-54.0, WIDTH=0.8, HEIGHT=0.8, VIEWS=6, ROWS=20, COLS=50,
                     ROW_SCALE=1 / 16, COL_SCALE=1 / 16, FIRST=True, METRES=types[metres], PIXELS=types[pixels], BLOCK=16, MAPS=8)
    signature = dict(points=f"*{metres}", matrices=f"*{pixels}", cells="*i32", seen="*i1", **dict.fromkeys(_STRIDES, "i32"),
                     **dict.fromkeys(constants, "constexpr"))
    source = ASTSource(_cells_kernel, signature, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(enable_fp_fusion=False)).asm["ptx"]
    arithmetic = set(re.findall(r"\b((?:fma|mad|div|mul|add|sub)\.[\w.]*f(?:32|64))\b", code))
    sizes = {"f" + name[2:] for name in (metres, pixels)}
    assert arithmetic == {f"{operation}.rn.{size}" for operation in ("div", "add") for size in sizes} | {f"mul.rn.f{pixels[2:]}"}


def test_backends(monkeypatch):
    arguments = *scene(LAYOUTS["both"], 1, 5, 0), 3
    with pytest.raises(ValueError, match="backend='cuda': choose 'auto', 'triton' or 'reference'"):
        query_windows(*arguments, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="the points are on cpu and Triton needs a GPU; TRITON_INTERPRET=1"):
        query_windows(*arguments, backend="triton")
    monkeypatch.setattr("cmtaqr.geometry._TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
        query_windows(*arguments, backend="triton")


def test_without_triton_everything_imports_and_the_benchmark_says_what_it_needs():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import cmtaqr.geometry, cmtaqr.windows_benchmark as b; assert not cmtaqr.geometry._TRITON; sys.exit(b.main([]))")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "the benchmark needs a CUDA device, and torch sees none"


@pytest.fixture
def kernel(cuda):
    if INTERPRETED:
        pytest.skip("needs Triton's compiler: unset TRITON_INTERPRET")
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_gpu_gives_the_bits_of_plain_torch(kernel, name):
    """Random points, every edge point, and as many random points near borders; compared with torch on the GPU and on the CPU."""
    for seed in range(20):
        assert check(scene(LAYOUTS[name], 3, 900, seed), kernel) > 0
    for seed in range(4):
        assert check(scene(LAYOUTS[name], 2, 0, seed, edges=1), kernel) > 0


@pytest.mark.gpu
def test_gpu_strides_and_operator(kernel):
    cell_cases.check_strides(kernel)
    cell_cases.check_operator("cuda")


def on(device, scene):
    points, matrices, *rest = scene
    return points.float().to(device), matrices.to(device), *rest


@pytest.mark.gpu
@pytest.mark.parametrize("points", [torch.float16, torch.bfloat16])
def test_gpu_half_precision_points(kernel, points):
    inputs, matrices, *rest = on(kernel, scene(LAYOUTS["both"], 2, 900, 0))
    got, expected = (query_windows(inputs.to(points), matrices, *rest, 3, backend=backend) for backend in ("triton", "reference"))
    assert torch.equal(got.cells, expected.cells) and torch.equal(got.seen, expected.seen)


@pytest.mark.gpu
def test_gpu_reads_nothing_back_and_allocates_the_result_alone(kernel):
    """900 queries, batch 4: windows and bias take under 1 MiB; the windows alone what they hold, in blocks of 512 bytes."""
    generator = AttentionBiasGenerator(window_size=[8, 5]).to(kernel)
    arguments = *on(kernel, scene(LAYOUTS["both"], 4, 900, 0)), [8, 5]
    weights = (torch.rand(4, 900, 2, device=kernel) * 2 - 1).requires_grad_()
    generator(weights, query_windows(*arguments))
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator(weights, query_windows(*arguments))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run, limit in ((lambda: query_windows(*arguments), 4 * 900 * 7 * 9 + 2 * 512),
                       (lambda: generator(weights, query_windows(*arguments)), 2**20)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        assert torch.cuda.max_memory_allocated() - before <= limit
        del result


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_points(kernel):
    first, other = (on(kernel, scene(LAYOUTS["both"], 2, 900, seed)) for seed in (0, 1))
    expected = query_windows(*other, [8, 5])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        query_windows(*first, [8, 5])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = query_windows(*first, [8, 5])
    for a, b in zip(first[:2], other[:2]):
        a.copy_(b)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got.cells, expected.cells) and torch.equal(got.seen, expected.seen)
