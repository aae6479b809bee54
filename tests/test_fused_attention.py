"""Fused attention with a local bias against float64: on the CPU in Triton's interpreter, on the GPU as it is."""
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from cmtaqr.attention import attention_reference, biased_attention, planned
from cmtaqr.bias import LocalBias
from cmtaqr.geometry import TokenLayout, Windows
from window_cases import SMALL, poisoned, random_windows

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton to test the fused kernels", allow_module_level=True)

import fused_cases
from fused_cases import CASES, CHECKS, FULL, INPUTS, KINDS, LAUNCHES, allowed_error, computed, random_inputs, same_bits

# What a result may differ from float64 by where torch's attention happens to be exact, as a share of the largest value: in half
# precision one rounding to the dtype; in fp32 the rounding of an exponent of up to 2^5, besides which the error of the GPU's
# powers of two, 2^-22, is small.
FLOOR = {torch.float32: 2**-19, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_accurate(errors, dtype, name="", slack=1):
    """At most twice (output) or three times (gradients) the error of torch's attention with a dense bias in the same dtype: the
    largest error, with a floor; and in half precision the root mean square, with none, unless the exact value is 0."""
    for tensor, (ours, plain, largest, our_mean, plain_mean) in errors.items():
        assert ours <= allowed_error(tensor, slack * plain, largest, slack * FLOOR[dtype]), (name, tensor, ours, plain, largest)
        if dtype != torch.float32 and slack == 1 and largest > 1e-9:
            assert our_mean <= (2 if tensor == "out" else 3) * plain_mean, (name, tensor, our_mean, plain_mean, largest)


def test_the_measure_refuses_zeros():
    """An all-zero result is wrong by the largest value; however small that is and however wrong torch is, it is too much."""
    for largest in (3e-4, 1.0, 50.0):
        for dtype, floor in FLOOR.items():
            assert_accurate({"out": [floor * largest, 0.0, largest, 0.0, 0.0]}, dtype)
            with pytest.raises(AssertionError):
                assert_accurate({"dvalue": [largest, largest, largest, 0.0, 0.0]}, dtype)
    assert_accurate({"dq": [1e-6, 0.0, 1e-16, 1e-6, 0.0]}, torch.float32)


@pytest.mark.parametrize("name, factor", [("out", 2), ("dvalue", 3)])
def test_the_measure_adds_no_floor_to_the_mean_error_in_half_precision(name, factor):
    assert_accurate({name: [1e-5, 0.0, 1.0, factor * 1e-6, 1e-6]}, torch.float16)
    with pytest.raises(AssertionError):
        assert_accurate({name: [1e-5, 0.0, 1.0, 1.1 * factor * 1e-6, 1e-6]}, torch.float16)


def test_shared_memory_is_enough_on_every_chip():
    """Kernels compiled for a chip with little of it, from how they are launched there."""
    found = script({"TRITON_INTERPRET": "0"}, "shared")
    little, plenty = ({name: n for name, n in found.items() if name.startswith("inf") == many} for many in (False, True))
    assert len(little) == 3 * 4 * 6 and len(plenty) == 6
    assert max(little.values()) <= fused_cases.LITTLE_MEMORY, max(little.items(), key=lambda item: item[1])
    assert fused_cases.LITTLE_MEMORY < max(plenty.values()) <= fused_cases.fused._WIDEST_ROWS


def script(environment, *arguments, timeout=None):
    command, env = [sys.executable, fused_cases.__file__, *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parent, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def interpreted():
    """Every case, by Triton's interpreter in one process of its own: the interpreter must be chosen before Triton is imported."""
    return script({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


def assert_case(name, errors, dtype, slack=1):
    """The errors of one of `CASES`, of all that it has to give."""
    if name.startswith("gradients of"):
        assert set(errors) == {"out"} | {f"d{n}" for n in INPUTS if n in name.removeprefix("gradients of ").split(", ")}
    elif name.startswith("generator"):
        assert set(errors) == {"out", "dq", "dk", "dv", "dweights", "dscale"}
    else:
        assert set(errors) == {"out", "dq", "dk", "dv"} | ({"dvalue"} if not name.startswith(("none", "no bias")) else set())
    assert_accurate(errors, dtype, name, slack)


def dtype_of(name):
    return getattr(torch, name.split()[-1]) if name.endswith("float16") else torch.float32


@pytest.mark.parametrize("name", CASES)
def test_interpreter_agrees_with_float64(interpreted, name):
    errors, dtype = interpreted[name], dtype_of(name)
    assert isinstance(errors, dict), errors
    # the interpreter cuts fp32 off to bfloat16 instead of rounding it, which doubles the error
    assert_case(name, errors, dtype, slack=2 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreter_check(interpreted, name):
    assert interpreted[name] is None, interpreted[name]


def small_input():
    windows = random_windows(SMALL, 2, 9, [4, 3])
    q, k, v, value, _ = random_inputs(windows)
    return q, k, v, LocalBias(windows, value)


def biased(q, k, v, bias, **options):
    return biased_attention(q, k, v, bias, backend="triton", **options)


def replaced(bias, value=None, **changes):
    return LocalBias(Windows(**{**vars(bias.windows), **changes}), bias.value if value is None else value)


@pytest.mark.parametrize("error, message, call", [
    (ValueError, r"needs q \[B, H, Q, D\] and k, v \[B, H, K, D\], got \[2, 9, 16\]",
     lambda q, k, v, b: biased(q[:, 0], k, v, b)),
    (ValueError, r"needs q .* got .*\[2, 2, 288, 8\]", lambda q, k, v, b: biased(q, k[..., :8], v[..., :8], b)),
    (ValueError, r"\(2, 9, 288\), but q and k hold \(2, 9, 287\)", lambda q, k, v, b: biased(q, k[:, :, 1:], v[:, :, 1:], b)),
    (ValueError, r"\(2, 9, 288\), but q and k hold \(2, 8, 288\)", lambda q, k, v, b: biased(q[:, :, 1:], k, v, b)),
    (ValueError, r"\(2, 9, 288\), but q and k hold \(1, 9, 288\)", lambda q, k, v, b: biased(q[:1], k[:1], v[:1], b)),
    (ValueError, r"the layout has 127 keys, but k holds 288",
     lambda q, k, v, b: biased(q, k, v, None, layout=fused_cases.COUNTED[127])),
    (ValueError, r"key_mask must be bool \[B, K\] = \[2, 288\].* got torch.float32",
     lambda q, k, v, b: biased(q, k, v, b, key_mask=torch.zeros(2, 288))),
    (ValueError, r"key_mask must be bool .* got torch.bool \[2, 287\]",
     lambda q, k, v, b: biased(q, k, v, b, key_mask=torch.zeros(2, 287) > 0)),
    (ValueError, r"bias values must be \[B, Q, 2\] = \[2, 9, 2\]",
     lambda q, k, v, b: biased(q, k, v, replaced(b, value=b.value[:, :8]))),
    (ValueError, r"q is on cpu, but .*meta", lambda q, k, v, b: biased(q, k.to("meta"), v, b)),
    (ValueError, r"q is on cpu, but .*meta", lambda q, k, v, b: biased(q, k, v.to("meta"), b)),
    (ValueError, r"q is on cpu, but .*meta", lambda q, k, v, b: biased(q, k, v, replaced(b, value=b.value.to("meta")))),
    (ValueError, r"q is on cpu, but .*meta", lambda q, k, v, b: biased(q, k, v, replaced(b, cells=b.windows.cells.to("meta")))),
    (ValueError, r"q is on cpu, but .*meta", lambda q, k, v, b: biased(q, k, v, replaced(b, seen=b.windows.seen.to("meta")))),
    (ValueError, r"the queries are on meta, but the windows on cpu", lambda q, k, v, b: planned(b, q.to("meta"))),
    (ValueError, r"the queries are on cpu, but the windows on cpu \(cells\) and meta",
     lambda q, k, v, b: planned(replaced(b, seen=b.windows.seen.to("meta")), q)),
    (ValueError, r"cells .* int64 or int32 and seen .* bool, got torch.float32",
     lambda q, k, v, b: biased(q, k, v, replaced(b, cells=b.windows.cells.float()))),
    (ValueError, r"seen .* bool, got torch.int64 and torch.uint8",
     lambda q, k, v, b: biased(q, k, v, replaced(b, seen=b.windows.seen.byte()))),
    (ValueError, r"one floating-point dtype, got torch.float32, torch.float16, torch.float32",
     lambda q, k, v, b: biased(q, k.half(), v, b)),
    (RuntimeError, r"backend='triton': the kernels compute in .* got torch.float64",
     lambda q, k, v, b: biased(q.double(), k.double(), v.double(), b)),
    (RuntimeError, r"backend='triton': the kernels take head dimensions .* got 12",
     lambda q, k, v, b: biased(q[..., :12], k[..., :12], v[..., :12], b)),
    (RuntimeError, r"backend='triton': .* no attn_mask",
     lambda q, k, v, b: biased(q, k, v, b, attn_mask=torch.zeros(9, 288) > 0)),
    (RuntimeError, r"backend='triton': .* \(dropout_p=0.1\)", lambda q, k, v, b: biased(q, k, v, b, dropout_p=0.1)),
    (RuntimeError, r"backend='triton': .* no forward-mode derivatives",
     lambda q, k, v, b: torch.func.jvp(lambda k: biased(q, k, v, b), (k,), (k,))),
    (RuntimeError, r"backend='triton': .* no forward-mode derivatives",
     lambda q, k, v, b: torch.func.jvp(lambda value: biased(q, k, v, replaced(b, value)), (b.value,), (b.value,))),
    (RuntimeError, r"backend='triton': torch.func's grad, vjp and jacrev .*: use torch.autograd",
     lambda q, k, v, b: torch.func.grad(lambda q: biased(q, k, v, b).sum())(q)),
    (RuntimeError, r"backend='triton': .* at most 65535 samples times heads .* got 8192 times 8",
     lambda q, k, v, b: biased(*(t[:1, :1].expand(8192, 8, -1, -1) for t in (q, k, v)), None)),
    (RuntimeError, r"backend='triton': .*one head counts as two.*got 32768 times 1",
     lambda q, k, v, b: biased(*(t[:1, :1].expand(32768, 1, -1, -1) for t in (q, k, v)), None)),
    (ValueError, r"maps of 1300 × 1300 and 1 × 1 cells: .* at most 1677721 cells",
     lambda q, k, v, b: fused_cases.fused.plan_bias(LocalBias(random_windows(TokenLayout((1300, 1300), None), 1, 1, 3),
                                                              torch.zeros(1, 1, 2)))),
    (ValueError, r"scale=-1.0: .* positive", lambda q, k, v, b: fused_cases.fused.fused_attention(q, k, v, b, scale=-1.0)),
    (ValueError, r"scale=0.0: .* positive", lambda q, k, v, b: fused_cases.fused.fused_attention(q, k, v, b, scale=0.0)),
    (ValueError, r"scale=tensor\(1.\): .* positive",
     lambda q, k, v, b: fused_cases.fused.fused_attention(q, k, v, b, scale=torch.ones(()))),
])
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call(*small_input())


@pytest.fixture
def kernels(cuda):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs Triton's compiler: unset TRITON_INTERPRET")
    return cuda


@pytest.fixture(scope="module")
def measured():
    """All cases of the GPU, in several processes so that their kernels compile side by side."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs a GPU and Triton's compiler: run `make test-gpu` on a machine that has one, without TRITON_INTERPRET")
    return script({}, "gpu", timeout=500)


def starting_with(measured, word):
    found = {name: errors for name, errors in measured.items() if name.startswith(word)}
    for name, errors in found.items():
        assert isinstance(errors, dict), (name, errors)
    return found


@pytest.mark.gpu
def test_gpu_random_cases(measured, kernels):
    """Layouts, windows, sizes, kinds, masks, dtypes and head dimensions drawn at random."""
    found = starting_with(measured, "random")
    assert len(found) == len(fused_cases.PROGRAMS) * fused_cases.DRAWS >= 500
    for name, errors in found.items():
        assert_accurate(errors, fused_cases.PROGRAMS[int(name.split()[1].split(".")[0])][0], name)


@pytest.mark.gpu
def test_gpu_counts_of_queries_and_keys(measured, kernels):
    found = starting_with(measured, "counted")
    assert len(found) == 20
    for name, errors in found.items():
        assert set(errors) == {"out", "dq", "dk", "dv", "dvalue"}
        assert_accurate(errors, torch.float16 if name.endswith((" 1", " 56400")) else torch.bfloat16, name)


@pytest.mark.gpu
def test_gpu_launches(measured, kernels):
    """Each way to launch the kernels, by itself."""
    found = starting_with(measured, "launch")
    assert len(found) == len(LAUNCHES)
    for name, errors in found.items():
        assert_accurate(errors, torch.bfloat16, name)


@pytest.mark.gpu
def test_gpu_head_dimension_128_in_float32(measured, kernels):
    """As the GPU at hand takes it, and in the steps of one with little shared memory."""
    found = starting_with(measured, "dimension 128, float32")
    assert len(found) == 2
    for name, errors in found.items():
        assert_accurate(errors, torch.float32, name)


@pytest.mark.gpu
def test_gpu_cases_of_the_interpreter(measured, kernels):
    """Every case that runs on the CPU; borders, corners, overlapping views, each subset of gradients and the generator's bounds
    also launched and computed as in the detector."""
    found = starting_with(measured, "small "), starting_with(measured, "usual ")
    assert [len(cases) for cases in found] == [len(CASES), len(fused_cases.USUAL_CASES)]
    for cases, dtype in zip(found, (None, fused_cases.USUAL["dtype"])):
        for name, errors in cases.items():
            assert_case(name.split(" ", 1)[1], errors, dtype or dtype_of(name))


@pytest.mark.gpu
def test_gpu_large_cases(measured, kernels):
    """The detector's numbers of keys in other dtypes, head dimensions, kinds and batches than those counted above."""
    found = starting_with(measured, "large")
    assert len(found) == len(fused_cases.LARGE)
    for name, errors in found.items():
        assert set(errors) == {"out", "dq", "dk", "dv", "dvalue"}
        assert_accurate(errors, fused_cases.LARGE[name.removeprefix("large ")][4], name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "operator"])
def test_gpu_check(kernels, name):
    assert CHECKS[name](kernels) is None


def full_case(device, batch=2, queries=900, kind="uniform", dtype=torch.bfloat16, heads=8, seed=0):
    """Inputs, gradient and bias at the size of the detector."""
    windows = random_windows(FULL[0], batch, queries, [8, 8], share=0.4, seed=seed, device=device)
    *inputs, grad = random_inputs(windows, heads, 32, dtype, seed)
    inputs = [t.requires_grad_() for t in inputs]
    return inputs, grad, LocalBias(windows, inputs[3], **KINDS[kind])


@pytest.mark.gpu
def test_gpu_repeats_are_bit_equal_whatever_memory_held(kernels):
    inputs, grad, bias = full_case(kernels)
    first = computed(inputs, grad, bias)
    assert all(t.isfinite().all() for t in first)
    for repeat in range(100):
        with poisoned() if repeat % 2 else nullcontext():
            assert same_bits(computed(inputs, grad, bias), first)


@pytest.mark.gpu
def test_gpu_tensors_on_another_than_the_current_device(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs in one process")
    inputs, grad, bias = full_case(torch.device("cuda", 1), queries=100)
    with torch.cuda.device(1):
        expected = computed(inputs, grad, bias)
    assert torch.cuda.current_device() == 0
    assert same_bits(computed(inputs, grad, planned(bias, inputs[0])), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "gaussian", "global"])
def test_gpu_poisoned_memory(kernels, kind):
    """The other kinds, ten times, key mask included."""
    inputs, grad, bias = full_case(kernels, queries=300, kind="uniform" if kind == "none" else kind)
    mask = fused_cases.random_mask(bias.windows)
    bias, inputs, options = (None, inputs[:3], dict(layout=bias.windows.layout)) if kind == "none" else (bias, inputs, {})
    first = computed(inputs, grad, bias, key_mask=mask, **options)
    for _ in range(10):
        with poisoned():
            again = computed(inputs, grad, bias, key_mask=mask, **options)
        assert all(t.isfinite().all() for t in again) and same_bits(again, first)


@pytest.mark.gpu
def test_gpu_compiled_as_a_whole(kernels):
    inputs, grad, bias = full_case(kernels, queries=100, heads=2)

    def attend(q, k, v, value, windows):
        return 2 * biased_attention(q, k, v, LocalBias(windows, value))

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(*inputs, bias.windows)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert same_bits(*results)


@pytest.mark.gpu
def test_gpu_operator(kernels):
    fused_cases.check_operator(kernels)


def places(bias):
    return bias.windows.cells, bias.windows.seen


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "global"])
def test_gpu_graph_replays_with_new_inputs_and_reads_nothing_back(kernels, kind):
    inputs, grad, bias = full_case(kernels, kind=kind)
    others, _, other = full_case(kernels, kind=kind, seed=1)
    expected = computed(others, grad, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            computed(inputs, grad, bias)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(inputs, grad, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = computed(inputs, grad, bias)
    with torch.no_grad():
        for mine, new in zip((*inputs, *places(bias)), (*others, *places(other))):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_autocast(kernels, dtype):
    inputs, grad, bias = full_case(kernels, batch=1, queries=100, dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        out = biased_attention(*inputs[:3], bias)
    assert out.dtype == dtype
    found = out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))
    assert all(a.dtype == b.dtype for a, b in zip(found[1:], inputs))
    low = [t.detach().to(dtype).requires_grad_() for t in inputs[:3]] + [inputs[3]]
    expected = computed(low, grad.to(dtype), bias)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_gpu_checkpointing(kernels, reentrant):
    inputs, grad, bias = full_case(kernels, batch=1)
    expected = computed(inputs, grad, bias)

    def attend(q, k, v, value):
        return biased_attention(q, k, v, LocalBias(bias.windows, value))

    def recomputed(q, k, v, _):
        return torch.utils.checkpoint.checkpoint(attend, q, k, v, inputs[3], use_reentrant=reentrant)

    if not reentrant:
        assert same_bits(computed(inputs, grad, bias, recomputed), expected)
        return
    # the reentrant form supports backward() only
    recomputed(*inputs[:3], None).backward(grad)
    assert same_bits([t.grad for t in inputs], expected[1:])


class Layer(torch.nn.Module):
    """Projections around the attention, and a bias value from the query."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(64, n) for n in (64, 64, 64, 2))

    def forward(self, x, tokens, windows):
        q, k, v, value = (layer(t) for layer, t in zip(self.project, (x, tokens, tokens, x)))
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (q, k, v))
        return biased_attention(q, k, v, LocalBias(windows, value.float())).transpose(1, 2).flatten(2)


@pytest.mark.gpu
def test_gpu_distributed_data_parallel(kernels, tmp_path):
    """One process: the same gradients with and without the wrapper."""
    torch.manual_seed(0)
    layer = Layer().to(kernels)
    windows = random_windows(SMALL, 2, 30, [4, 3], device=kernels)
    x, tokens = torch.randn(2, 30, 64, device=kernels), torch.randn(2, SMALL.num_keys, 64, device=kernels)
    backend = "nccl" if torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        results = []
        for module in (layer, torch.nn.parallel.DistributedDataParallel(layer, device_ids=[kernels.index or 0])):
            layer.zero_grad()
            module(x, tokens, windows).square().sum().backward()
            results.append([p.grad.clone() for p in layer.parameters()])
        assert same_bits(*results) and all(g.abs().max() > 0 for g in results[0] if g.numel() > 64)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_queries_times_keys(kernels):
    """Beyond output, gradients and what is kept between the passes: a few copies of what is as large as the queries."""
    inputs, grad, bias = full_case(kernels, queries=1800)
    computed(inputs, grad, bias)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = computed(inputs, grad, bias)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in results)
    assert extra < 24 * inputs[0].numel() * 4


@pytest.mark.gpu
def test_gpu_more_samples_than_programs_along_an_axis(kernels):
    """The largest number of samples that the kernels take, and one more, which goes another way by itself."""
    layout = TokenLayout((2, 2), (1, 1, 2))
    for batch in (32767, 32768):
        windows = random_windows(layout, batch, 1, 1, device=kernels)
        q, k, v, value, _ = random_inputs(windows, 1)
        bias = planned(LocalBias(windows, value), q)
        torch.testing.assert_close(biased_attention(q, k, v, bias), attention_reference(q, k, v, bias), rtol=1e-4, atol=1e-5)
        assert (bias.plan is None) == (batch == 32768)


@pytest.mark.gpu
def test_gpu_masked_keys_take_the_kernels(kernels):
    """Without bias and layout: no matrix of queries x keys."""
    q, k, v = (torch.randn(1, 2, n, 32, device=kernels, dtype=torch.bfloat16) for n in (900, 22384, 22384))
    ignored = torch.rand(1, 22384, device=kernels) < 0.5
    expected = attention_reference(q.double(), k.double(), v.double(), attn_mask=ignored[:, None].expand(-1, 900, -1))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = biased_attention(q, k, v, key_mask=ignored)
    assert torch.cuda.max_memory_allocated() - before < 900 * 22384
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(kernels):
    """More than 2^31 elements in the keys: the last sample by itself gives the same bits."""
    batch, heads, queries = 384, 8, 20
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    windows = random_windows(FULL[0], batch, queries, [8, 8], share=0.4, device=kernels)
    q, k, v, value, _ = random_inputs(windows, heads, 32, torch.float16)
    assert k.numel() > 2**31
    last = slice(batch - 1, batch)
    few = Windows(windows.layout, windows.cells[last], windows.seen[last], windows.sizes)
    # one sample alone would split the keys otherwise
    with torch.no_grad(), fused_cases.launched(occupancy=0):
        for settings in (KINDS["uniform"], KINDS["global"]):
            out = biased(q, k, v, LocalBias(windows, value, **settings))
            assert torch.equal(out[last], biased(q[last], k[last], v[last], LocalBias(few, value[last], **settings)))
