"""Attention with a local bias against a literal loop and float64; the router; both on the GPU where there is one."""
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.utils._python_dispatch import TorchDispatchMode

from cmtaqr.attention import attention_reference, biased_attention, dispatch, planned, window_attention_reference
from cmtaqr.bias import AttentionBiasGenerator, LocalBias
from cmtaqr.geometry import TokenLayout, Windows
from cmtaqr.router import AQRWeightGenerator

from test_geometry import random_windows
from test_window_attention import interpret

LAYOUT = TokenLayout(lidar=(6, 5), camera=(3, 4, 5))
KINDS = {"none": None, "local": {}, "gaussian": dict(sigma=(2.5, 1.0)), "global": dict(is_global=True)}


def inputs(queries=7, batch=2, heads=2, dim=4, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(1)
    lengths = queries, LAYOUT.num_keys, LAYOUT.num_keys
    tensors = [torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64) for n in lengths]
    tensors.append(3 * torch.randn(batch, queries, 2, generator=g, dtype=torch.float64))
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def loop_attention(q, k, v, bias, mask):
    """One query and head at a time, in Python."""
    out = torch.zeros_like(q)
    dense = torch.zeros(len(q), q.shape[2], k.shape[2]) if bias is None else bias.dense()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                allowed = [j for j in range(k.shape[2]) if mask is None or not mask[b, i, j]]
                scores = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(q.shape[3]) + float(dense[b, i, j]) for j in allowed]
                total = sum(math.exp(s) for s in scores)
                for s, j in zip(scores, allowed):
                    out[b, h, i] += math.exp(s) / total * v[b, h, j]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_is_the_definition(kind, masked, backend):
    q, k, v, value = inputs()
    windows = random_windows(LAYOUT, 2, 7, [4, 3])
    bias = None if KINDS[kind] is None else LocalBias(windows, value, **KINDS[kind])
    mask = torch.rand(2, 7, LAYOUT.num_keys, generator=torch.Generator().manual_seed(2)) < 0.4 if masked else None
    if masked:
        mask[1, 3] = True
    with torch.no_grad():
        expected = loop_attention(q, k, v, bias, mask)
    torch.testing.assert_close(biased_attention(q, k, v, bias, mask, backend=backend), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Of queries, keys, values and the bias values, across chunks; and through weights and scale."""
    q, k, v, value = inputs(queries=3, batch=1, heads=1, dim=2)
    windows = random_windows(LAYOUT, 1, 3, [4, 3])

    def attend(q, k, v, value):
        bias = None if KINDS[kind] is None else LocalBias(windows, value, **KINDS[kind])
        return attention_reference(q, k, v, bias, chunk_size=2)

    assert torch.autograd.gradcheck(attend, (q, k, v, value) if KINDS[kind] is not None else (q, k, v, value.detach()))


def test_gradient_of_weights_and_scale_through_attention():
    q, k, v, _ = inputs(queries=4, batch=1, heads=1, dim=2)
    windows = random_windows(LAYOUT, 1, 4, [4, 3])
    generator = AttentionBiasGenerator(window_size=[4, 3]).double()
    weights = torch.tensor([[[0.5, -0.3], [-0.9, 0.1], [0.0, 0.7], [0.2, 0.2]]], dtype=torch.float64, requires_grad=True)

    def attend(weights, scale):
        bias = torch.func.functional_call(generator, {"bias_scale": scale}, (weights, windows))
        return attention_reference(q.detach(), k.detach(), v.detach(), bias, chunk_size=3)

    assert torch.autograd.gradcheck(attend, (weights, torch.tensor(2.5, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("error, message, change", [
    (TypeError, "q must be a tensor, got list", dict(q=[1.0])),
    (TypeError, "attn_mask must be a tensor, got list", dict(attn_mask=[[True]])),
    (TypeError, "key_mask must be a tensor, got ndarray", dict(key_mask=torch.zeros(2, 90).numpy())),
    (TypeError, "bias must be one .*LocalBias, got Tensor; a dense bias goes to", dict(bias=torch.zeros(2, 7, 90))),
    (TypeError, "bias must be one .*LocalBias, got list", dict(bias=[None])),
    (ValueError, "dropout_p=None: must be a number from 0 to 1", dict(dropout_p=None)),
    (ValueError, "dropout_p='a': must be", dict(dropout_p="a")),
    (ValueError, "dropout_p=1.5: must be", dict(dropout_p=1.5)),
    (ValueError, "dropout_p=nan: must be", dict(dropout_p=math.nan)),
    (TypeError, r"layout must be a .*TokenLayout\(lidar, camera\), got tuple", dict(layout=((6, 5), (3, 4, 5)))),
    (ValueError, "one floating-point dtype, got torch.int64, torch.int64, torch.int64",
     {name: torch.zeros(2, 2, n, 4, dtype=torch.long) for name, n in (("q", 7), ("k", 90), ("v", 90))}),
    (ValueError, "one floating-point dtype, got torch.float32, torch.bool, torch.float32", dict(k=torch.zeros(2, 2, 90, 4) > 0)),
    (ValueError, "one floating-point dtype, got torch.float32, torch.float32, torch.float16",
     dict(v=torch.zeros(2, 2, 90, 4).half())),
    (ValueError, "attn_mask must be bool", dict(attn_mask=torch.zeros(7, 90))),
    (ValueError, r"attn_mask must be \[Q, K\] or \[B, Q, K\], got \[7, 89\]", dict(attn_mask=torch.zeros(7, 89) > 0)),
    (ValueError, r"attn_mask must be \[Q, K\] or \[B, Q, K\], got \[7, 1\]", dict(attn_mask=torch.zeros(7, 1) > 0)),
    (ValueError, "q is on cpu, but k, v, the masks or the bias on .*meta", dict(attn_mask=(torch.zeros(7, 90) > 0).to("meta"))),
])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_does_not_fit_is_refused(error, message, change, biased, masked):
    """Whether it comes alone or with a bias or a mask of the keys that are all right."""
    q, k, v, value = (t.detach() for t in inputs(dtype=torch.float32))
    right = dict(q=q, k=k, v=v, bias=LocalBias(random_windows(LAYOUT, 2, 7, [4, 3]), value) if biased else None,
                 key_mask=torch.zeros(2, 90) > 0 if masked else None)
    with pytest.raises(error, match=message):
        biased_attention(**right | change)


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "k must be a tensor, got list", lambda q, k, v, b: attention_reference(q, [k], v, b)),
    (TypeError, "bias must be one .*LocalBias, got Tensor", lambda q, k, v, b: attention_reference(q, k, v, b.dense())),
    (TypeError, "attn_mask must be a tensor, got list", lambda q, k, v, b: attention_reference(q, k, v, b, [[True]])),
    (ValueError, "dropout_p=-0.1: must be", lambda q, k, v, b: attention_reference(q, k, v, b, dropout_p=-0.1)),
    (ValueError, "chunk_size=2.5: must be an integer", lambda q, k, v, b: attention_reference(q, k, v, b, chunk_size=2.5)),
    (ValueError, "seen of dtype bool, got torch.int64 and torch.uint8",
     lambda q, k, v, b: attention_reference(q, k, v, LocalBias(changed(b.windows, seen=b.windows.seen.byte()), b.value))),
    (TypeError, "q must be a tensor, got list", lambda q, k, v, b: window_attention_reference([q], k, v, b.windows)),
    (TypeError, "windows must be a .*Windows, got LocalBias", lambda q, k, v, b: window_attention_reference(q, k, v, b)),
    (ValueError, "cells of dtype int64 or int32 .* got torch.float32",
     lambda q, k, v, b: window_attention_reference(q, k, v, changed(b.windows, cells=b.windows.cells.float()))),
    (ValueError, "one floating-point dtype, got torch.float32, torch.float16",
     lambda q, k, v, b: window_attention_reference(q, k.half(), v.half(), b.windows)),
    (TypeError, "bias must be one .*LocalBias, got list", lambda q, k, v, b: planned([b], q)),
    (TypeError, "queries must be a tensor, got list", lambda q, k, v, b: planned(b, [q])),
    (TypeError, "tensor of values, got Windows and list", lambda q, k, v, b: LocalBias(b.windows, b.value.tolist())),
    (TypeError, "tensor of values, got NoneType and Tensor", lambda q, k, v, b: LocalBias(None, b.value)),
    *[(ValueError, "sigma=.*: expected one positive number, or two",
       lambda q, k, v, b, sigma=sigma: LocalBias(b.windows, b.value, sigma))
      for sigma in (0, (0.0, 0.0), (-1.0, 1.0), (1.0, math.nan), (1.0, 2.0, 3.0), "wide")],
])
def test_other_functions_refuse_too(error, message, call):
    q, k, v, value = (t.detach() for t in inputs(dtype=torch.float32))
    with pytest.raises(error, match=message):
        call(q, k, v, LocalBias(random_windows(LAYOUT, 2, 7, [4, 3]), value))


def changed(windows, **changes):
    return Windows(**{**vars(windows), **changes})


def test_one_width_is_that_of_both_sensors():
    q, k, v, value = inputs()
    windows = random_windows(LAYOUT, 2, 7, [4, 3])
    one, two = (biased_attention(q, k, v, LocalBias(windows, value, sigma=sigma)) for sigma in (2, (2.0, 2.0)))
    assert torch.equal(one, two) and not torch.equal(one, biased_attention(q, k, v, LocalBias(windows, value)))


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_map_beyond_the_kernels_goes_another_way(monkeypatch):
    """`auto` and `planned` do without them, 'triton' says why."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    import cmtaqr.attention.plan  # noqa: F401  before the interpreter is chosen, which should not outlive this test
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layout = TokenLayout((1300, 1300), None)
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16).expand(-1, -1, layout.num_keys, -1)
    v = torch.arange(layout.num_keys, dtype=torch.float32)[:, None].expand(1, 1, -1, 16)
    windows = Windows(layout, torch.zeros(1, 1, 1, 2, dtype=torch.long), torch.ones(1, 1, 1) > 0, (3,))
    bias = LocalBias(windows, torch.full((1, 1, 2), 20.0))
    with pytest.raises(RuntimeError, match="backend='triton': the kernels find a key on maps of at most 1677721 cells"):
        biased_attention(q, k, v, bias, backend="triton")
    gpu = q.as_subclass(OnGpu)
    assert planned(bias, gpu) is bias
    expected = attention_reference(q, k, v, bias)
    assert torch.equal(biased_attention(gpu, k, v, bias).as_subclass(torch.Tensor), expected) and expected.max() < 2000
    everywhere = LocalBias(windows, bias.value, is_global=True)                        # of which no plan is made
    assert dispatch._triton_obstacle(q, k, v, everywhere, None, 0.0) is None


WIDENED = """
import torch
from cmtaqr.attention import attention_reference, biased_attention, fused
from test_attention import LAYOUT, LocalBias, OnGpu, random_windows

kernels, taken = fused.fused_attention, []
fused.fused_attention = lambda q, *rest: taken.append(q.shape[3]) or kernels(q, *rest)
windows = random_windows(LAYOUT, 1, 9, [4, 3])
torch.manual_seed(0)
for dim in (8, 24, 96, 136):
    inputs = [torch.randn(1, 2, n, dim).requires_grad_() for n in (9, LAYOUT.num_keys, LAYOUT.num_keys)]
    inputs.append(torch.randn(1, 9, 2).requires_grad_())
    results = []
    for attend, q in ((biased_attention, inputs[0].as_subclass(OnGpu)), (attention_reference, inputs[0])):
        out = attend(q, *inputs[1:3], LocalBias(windows, inputs[3], sigma=(1.0, 2.0))).as_subclass(torch.Tensor)
        results.append((out, *torch.autograd.grad(out.cos().sum(), inputs)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
assert taken == [16, 32, 128], taken                                                   # none for 136
"""


def test_other_head_dimensions_are_filled_up_for_the_kernels():
    """In the interpreter, with queries that say that they are on a GPU; the scale stays that of the channels given."""
    interpret("-c", WIDENED)


def test_transforms_and_fake_tensors_see_the_same_attention():
    """Nothing looks at values that a transform or a fake tensor does not show, and no tangent is dropped."""
    q, k, v, value = (t.detach() for t in inputs())
    windows, zero = random_windows(LAYOUT, 2, 7, [4, 3]), torch.zeros_like(value)

    def attend(value):
        return biased_attention(q, k, v, LocalBias(windows, value))

    values = torch.stack([value, zero])
    torch.testing.assert_close(torch.func.vmap(attend)(values), torch.stack([attend(value), attend(zero)]))
    for start in (value, zero):
        forward = torch.func.jvp(attend, (start,), (value,))[1]
        step = 1e-6 * value
        torch.testing.assert_close(forward, (attend(start + step) - attend(start - step)) / 2e-6, rtol=1e-5, atol=1e-7)
        with dual_level():
            torch.testing.assert_close(unpack_dual(attend(make_dual(start, value))).tangent, forward)
    for bias in (None, LocalBias(windows, zero)):          # PyTorch's kernels, which auto takes here, have no forward mode
        forward = torch.func.jvp(lambda q: biased_attention(q, k, v, bias), (q,), (q,))[1]
        step = 1e-6 * q
        torch.testing.assert_close(forward, (attention_reference(q + step, k, v) - attention_reference(q - step, k, v)) / 2e-6,
                                   rtol=1e-5, atol=1e-7)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (q, k, v, zero, windows.cells, windows.seen)]
        bias = LocalBias(Windows(LAYOUT, *fake[4:], windows.sizes), fake[3])
        assert biased_attention(*fake[:3], bias).shape == q.shape


def test_zero_bias_changes_nothing():
    q, k, v, value = inputs(dtype=torch.float32)
    bias = LocalBias(random_windows(LAYOUT, 2, 7, 3), torch.zeros(2, 7, 2))
    assert torch.equal(attention_reference(q, k, v, bias), attention_reference(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, dict(sigma=(1.0, 2.5)), dict(is_global=True)])
def test_values_of_other_dtypes_are_the_same_bias(dtype, settings):
    """Computed in the dtype of the scores: half precision does not round the Gaussian, and float64 is no error."""
    q, k, v, value = (t.detach() for t in inputs(dtype=torch.float32))
    windows, value = random_windows(LAYOUT, 2, 7, [4, 3]), value.to(dtype)
    for backend in ("auto", "sdpa"):
        out, expected = (biased_attention(q, k, v, LocalBias(windows, t, **settings), backend=backend)
                         for t in (value, value.float()))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_window_attention_is_masked_attention():
    q, k, v, _ = inputs()
    windows = random_windows(LAYOUT, 2, 7, [4, 3])
    windows.seen[0, 2] = False
    expected = attention_reference(q, k, v, attn_mask=~windows.mask())
    got = window_attention_reference(q, k, v, windows, chunk_size=3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(got[0, :, 2]) == 0
    for a, b in zip(torch.autograd.grad(got.cos().sum(), (q, k, v)), torch.autograd.grad(expected.cos().sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_dropout_is_repeated_in_the_backward_pass():
    """The output is linear in v with the dropped probabilities as factors: its gradient must use the same draw."""
    q, k, v, value = inputs()
    torch.manual_seed(3)
    bias = LocalBias(random_windows(LAYOUT, 2, 7, 3), value.detach())
    out = attention_reference(q.detach(), k.detach(), v, bias, dropout_p=0.5, chunk_size=2)
    grad, = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())
    assert not torch.allclose(out, attention_reference(q, k, v))


def test_router_weights_start_at_zero_and_are_defined_without_windows():
    torch.manual_seed(0)
    router = AQRWeightGenerator(32, 4, 64, window_sizes=[4, 3])
    windows = random_windows(LAYOUT, 2, 7, 1)
    windows.seen[0, 2] = False
    tokens = torch.randn(2, 7, 32), torch.randn(2, LAYOUT.num_keys, 32), torch.randn(2, LAYOUT.num_keys, 32)
    assert torch.count_nonzero(router(*tokens, windows)) == 0
    torch.nn.init.normal_(router.to_weights.weight)
    weights = router(*tokens, windows)
    assert weights.isfinite().all() and weights.abs().max() <= 1 and weights[0, 2].abs().max() > 0
    weights.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


class Watch(TorchDispatchMode):
    """Remembers how many numbers the largest result of an operation has in memory."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_large_memory_stays_small():
    """No operation of the router makes a tensor of the size queries x keys."""
    layout, queries = TokenLayout((96, 96), (6, 20, 50)), 400
    router = AQRWeightGenerator(16, 4, 32, window_sizes=[8, 5])
    windows = random_windows(layout, 1, queries, 1)
    windows.seen[..., 1:] &= windows.seen[..., 1:].cumsum(-1) <= 2
    tokens = torch.randn(1, queries, 16), torch.randn(1, layout.num_keys, 16), torch.randn(1, layout.num_keys, 16)
    with Watch() as watch:
        router(*tokens, windows).sum().backward()
    assert watch.largest < 0.2 * queries * layout.num_keys


def test_masked_keys_make_no_matrix():
    """One row of the mask for all queries; a sample all of whose keys are ignored gets zeros."""
    q, k, v = (torch.randn(2, 2, n, 8) for n in (300, 500, 500))
    ignored = torch.rand(2, 500) < 0.3
    ignored[1] = True
    with Watch() as watch:
        out = biased_attention(q, k, v, key_mask=ignored)
    assert watch.largest < 0.2 * 300 * 500
    expected = attention_reference(q.double(), k.double(), v.double(), attn_mask=ignored[:, None].expand(-1, 300, -1))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(out[1]) == 0 and torch.count_nonzero(out[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_agrees_with_float64(cuda, dtype):
    """Attention, router and bias on the GPU, under autocast too; geometry without copying anything back."""
    q, k, v, value = inputs(dtype=dtype, device=cuda)
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v, value)]
    windows, windows_gpu = (random_windows(LAYOUT, 2, 7, [4, 3], device=d) for d in ("cpu", cuda))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = attention_reference(*exact[:3], LocalBias(windows, exact[3]))
    gradient = torch.autograd.grad(expected.square().sum(), exact)
    for backend in ("reference", "sdpa"):
        out = biased_attention(q, k, v, LocalBias(windows_gpu, value.float()), backend=backend)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
        for a, b in zip(torch.autograd.grad(out.float().square().sum(), (q, k, v, value)), gradient):
            size = max(1.0, float(b.abs().max()))
            torch.testing.assert_close(a.double().cpu(), b, rtol=5 * tolerance, atol=5 * tolerance * size)

    router = AQRWeightGenerator(32, 4, 64, window_sizes=[4, 3]).eval()
    torch.nn.init.normal_(router.to_weights.weight, std=0.3)
    tokens = torch.randn(2, 7, 32), torch.randn(2, LAYOUT.num_keys, 32), torch.randn(2, LAYOUT.num_keys, 32)
    expected = router(*tokens, windows)
    router.to(cuda)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        weights = router(*(t.to(cuda) for t in tokens), windows_gpu)
        bias = AttentionBiasGenerator().to(cuda)(weights, windows_gpu)
    assert weights.dtype == bias.value.dtype == torch.float32
    torch.testing.assert_close(weights.cpu(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 5e-2)

    torch.cuda.set_sync_debug_mode("error")
    try:
        windows_gpu.keys()
        windows_gpu.bounds()
        bias.dense(slice(0, 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
