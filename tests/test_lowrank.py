"""Low-rank bias through plain kernels, its factors, and the backends 'flex' and 'flash_attn', against float64."""
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from cmtaqr.attention import attention_reference, biased_attention, dispatch, lowrank
from cmtaqr.attention.flex import flex_biased_attention
from cmtaqr.attention.lowrank import decompose, flash_bias, global_bias_factors
from cmtaqr.bias import LocalBias
from cmtaqr.geometry import TokenLayout

from test_geometry import random_windows

BOTH = TokenLayout(lidar=(6, 5), camera=(3, 4, 5))
LAYOUTS = {"both": BOTH, "lidar": TokenLayout((6, 5), None), "camera": TokenLayout(None, (3, 4, 5))}
KINDS = {"uniform": {}, "gaussian": dict(sigma=(2.5, 1.0)), "global": dict(is_global=True)}
HALF = torch.float16, torch.bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(batch=2, heads=3, queries=7, keys=50, dim=8, dtype=torch.float64):
    return [normal(batch, heads, n, dim, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate((queries, keys, keys))]


def factors(shape=(2, 3), queries=7, keys=50, rank=2, dtype=torch.float64):
    return [normal(*shape, n, rank, seed=5 + i, dtype=dtype).requires_grad_() for i, n in enumerate((queries, keys))]


def dense_attention(q, k, v, q_bias, k_bias, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return (q @ k.mT * scale + q_bias @ k_bias.mT).softmax(-1) @ v


def gradients(out, inputs):
    weights = normal(*out.shape, seed=9).to(out.device)
    return torch.autograd.grad((out.double() * weights).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
@pytest.mark.parametrize("shape, rank, dim, scale", [((2, 3), 2, 8, None), ((1, 1), 5, 13, 0.7), ((2, 1), 1, 30, 3.0),
                                                     ((1, 3), 8, 32, None)])
def test_flash_bias_is_attention_with_the_product(backend, shape, rank, dim, scale):
    inputs = *tokens(dim=dim), *factors(shape, rank=rank)
    out, expected = flash_bias(*inputs, scale, backend), dense_attention(*inputs, scale)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs)):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("needed", range(5))
def test_gradient_of_each_input_alone(needed):
    inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate((*tokens(), *factors()))]
    (a,), (b,) = (gradients(f(*inputs), [inputs[needed]]) for f in (flash_bias, dense_attention))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    inputs = *tokens(1, 2, 3, 4, 2), *factors((1, 1), 3, 4, 1)
    assert torch.autograd.gradcheck(lambda *t: flash_bias(*t, backend="math"), inputs)


def test_inputs_may_be_strided():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens())
    q_bias, k_bias = (t.mT.contiguous().mT for t in factors())
    inputs = q, k, v, q_bias, k_bias
    torch.testing.assert_close(flash_bias(*inputs), dense_attention(*inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_other_dtypes(dtype, tolerance, backend):
    inputs = *tokens(dtype=dtype), *factors(dtype=torch.float32)
    out, expected = flash_bias(*inputs, backend=backend, split=True), dense_attention(*(t.double() for t in inputs))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b, t in zip(gradients(out, inputs), gradients(expected, inputs), inputs):
        assert a.dtype == t.dtype
        size = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), rtol=3 * tolerance, atol=3 * tolerance * size)


@pytest.mark.parametrize("dtype", HALF)
def test_split_factors_keep_the_bias(dtype):
    """The products that the channels make, in exact arithmetic: off by the rounding of two factors, or by its square."""
    q_bias, k_bias = (f.detach() for f in factors((1, 1), 200, 300, 1, torch.float32))
    exact, unit = q_bias.double() @ k_bias.double().mT, torch.finfo(dtype).eps / 2
    for split, at_least, at_most in ((False, unit / 4, 2.1 * unit), (True, 0, 4 * unit ** 2)):
        rows, columns = (torch.cat(parts, -1).double() for parts in lowrank._channels(q_bias, k_bias, dtype, 0.25, split))
        assert rows.shape[3] == columns.shape[3] == (3 if split else 1)
        assert at_least < (0.25 * rows @ columns.mT - exact).abs().max() / exact.abs().max() < at_most


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype, forbidden", [(torch.float16, -1e4), (torch.float16, 3e4), (torch.float16, -1e9),
                                              (torch.bfloat16, -1e4), (torch.float32, torch.finfo(torch.float32).min)])
def test_factors_of_a_mask_do_not_overflow(dtype, forbidden, split):
    """The factor of the queries is large, or that of the keys: both to twice the error of the dense bias in the same dtype."""
    inputs = tokens(dim=64, dtype=dtype)
    rows, columns = torch.full((1, 1, 7, 1), forbidden), (torch.arange(50) % 3 == 0).float()[None, None, :, None]
    expected = dense_attention(*(t.double() for t in inputs), rows.double(), columns.double())
    exact = expected, *gradients(expected, inputs)
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=(rows.clamp(min=-6e4) @ columns.mT).to(dtype))
    usual = dense, *gradients(dense, inputs)
    for factors in ((rows, columns), (rows.sign(), columns * abs(forbidden))):
        out = flash_bias(*inputs, *factors, split=split)
        for a, b, c in zip((out, *gradients(out, inputs)), usual, exact):
            error, allowed = ((t.double() - c).square().mean().sqrt() for t in (a, b))
            assert error <= 2 * allowed + 1e-7


def test_split_changes_nothing_where_nothing_is_rounded():
    inputs = *tokens(dtype=torch.float32), *factors(dtype=torch.float32)
    assert torch.equal(flash_bias(*inputs, split=True), flash_bias(*inputs))


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
def test_flash_bias_compiles_in_one_graph(backend):
    inputs = *tokens(dtype=torch.float32), *factors(dtype=torch.float32)
    compiled = torch.compile(lambda *t: flash_bias(*t, backend=backend, split=True), fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), flash_bias(*inputs, backend=backend)
    torch.testing.assert_close(out, expected)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b)


def test_autocast_splits_for_the_dtype_it_computes_in():
    inputs = *tokens(dtype=torch.float32), *(4 * f for f in factors(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_bias(*inputs, split=True)
    halves = [t.bfloat16() for t in inputs[:3]]
    assert out.dtype == torch.bfloat16 and torch.equal(out, flash_bias(*halves, *inputs[3:], split=True))


def test_autocast_leaves_float64_alone_as_pytorch_does():
    inputs = *tokens(), *factors()
    bias = LocalBias(random_windows(BOTH, 2, 7, 3), normal(2, 7, 2))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.scaled_dot_product_attention(*inputs[:3])
        assert plain.dtype == torch.float64 and torch.equal(biased_attention(*inputs[:3]), plain)
        assert torch.equal(flash_bias(*inputs), flash_bias(*inputs)) and flash_bias(*inputs).dtype == torch.float64
        assert biased_attention(*tokens(keys=BOTH.num_keys), bias).dtype == torch.float64
        with pytest.raises(ValueError, match="one floating-point dtype, got torch.float64, torch.bfloat16"):
            biased_attention(inputs[0], *(t.float() for t in inputs[1:3]))


def test_nothing_to_attend_to():
    q, k, v = tokens(keys=0)
    out = flash_bias(q, k, v, *factors(keys=0))
    assert out.shape == q.shape and torch.count_nonzero(out) == 0
    assert flash_bias(*tokens(queries=0), *factors(queries=0)).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("change, error, text", [
    (dict(backend="triton"), ValueError, "choose one of 'auto', 'flash'"),
    (dict(scale=0.0), ValueError, "scale=0.0: must be positive"),
    (dict(scale=-1.0), ValueError, "must be positive"),
    (dict(scale=math.nan), ValueError, "must be positive"),
    (dict(scale=math.inf), ValueError, "must be positive and finite"),
    (dict(q_bias=normal(2, 3, 7, 3)), ValueError, "same rank R, got 3 and 2"),
    (dict(q_bias=normal(2, 2, 7, 2)), ValueError, r"q_bias must be \[2 or 1, 3 or 1, 7, R\]"),
    (dict(k_bias=normal(1, 1, 49, 2)), ValueError, r"k_bias must be \[2 or 1, 3 or 1, 50, R\], got \[1, 1, 49, 2\]"),
    (dict(k_bias=normal(50, 2)), ValueError, "k_bias must be"),
    (dict(k_bias=torch.zeros(1, 1, 50, 2, device="meta")), ValueError, "k_bias is on meta.* move them together"),
    (dict(k=torch.zeros(2, 3, 50, 8, device="meta")), ValueError, "^k is on meta, but q on cpu: move them together"),
    (dict(v=torch.zeros(2, 3, 50, 8, device="meta")), ValueError, "^v is on meta, but q on cpu"),
    (dict(q_bias=[1.0]), TypeError, "q_bias must be a tensor, got list"),
    (dict(v=normal(2, 3, 50, 8, dtype=torch.float32)), ValueError, "one floating-point dtype"),
    (dict(dropout_p=None), ValueError, "dropout_p=None: must be a number from 0 to 1"),
    (dict(v=normal(2, 3, 50, 7)), ValueError, "attention needs q"),
    (dict(backend="cudnn"), RuntimeError, "needs a GPU, and the tensors are on cpu"),
    (dict(backend="efficient"), RuntimeError, "needs a GPU"),
    (dict(backend="flash_attn"), RuntimeError, "flash-attn package is not installed|needs a GPU"),
])
def test_flash_bias_refuses(change, error, text):
    q, k, v = tokens()
    q_bias, k_bias = factors()
    with pytest.raises(error, match=text):
        flash_bias(**(dict(q=q, k=k, v=v, q_bias=q_bias, k_bias=k_bias) | change))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_global_bias_is_its_factors(name, seed):
    layout = LAYOUTS[name]
    value = normal(2, 7, 2, seed=seed).requires_grad_()
    bias = LocalBias(random_windows(layout, 2, 7, [4, 3], seed), value, is_global=True)
    q_bias, k_bias = global_bias_factors(bias)
    rank = 2 if name == "both" else 1
    assert q_bias.shape == (2, 1, 7, rank) and k_bias.shape == (1, 1, layout.num_keys, rank)
    assert torch.equal((q_bias @ k_bias.mT)[:, 0], bias.dense())
    assert torch.linalg.matrix_rank(bias.dense()).tolist() == [rank] * 2

    q, k, v = tokens(keys=layout.num_keys)
    out, expected = flash_bias(q, k, v, q_bias, k_bias), attention_reference(q, k, v, bias)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(out, (q, k, v, value)), gradients(expected, (q, k, v, value))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_local_bias_has_no_factors():
    with pytest.raises(ValueError, match="only a global bias is exactly of low rank"):
        global_bias_factors(LocalBias(random_windows(BOTH, 2, 7, 3), torch.zeros(2, 7, 2)))


@pytest.mark.parametrize("rank", [1, 4, 11, 12])
def test_decomposition_error_is_the_tail_of_the_singular_values(rank):
    matrix = normal(3, 12, 20)
    singular = torch.linalg.svdvals(matrix)
    q_bias, k_bias, error = decompose(matrix, rank=rank)
    assert q_bias.shape == (3, 12, rank) and k_bias.shape == (3, 20, rank)
    difference = matrix - q_bias @ k_bias.mT
    torch.testing.assert_close(error.frobenius, singular[:, rank:].square().sum(1).sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(error.frobenius, difference.flatten(1).norm(dim=1))
    torch.testing.assert_close(error.maximum, difference.flatten(1).abs().amax(1))
    assert (error.maximum <= F.pad(singular, (0, 1))[:, rank] + 1e-12).all()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3, 0.0])
def test_tolerance_gives_the_smallest_rank(tolerance):
    matrix = normal(2, 10, 16) @ torch.diag(torch.logspace(0, -5, 16, dtype=torch.float64))
    norm = matrix.flatten(1).norm(dim=1)
    q_bias, _, error = decompose(matrix, tolerance=tolerance)
    rank = q_bias.shape[2]
    assert (error.frobenius <= tolerance * norm + 1e-13).all()
    assert rank == 1 or (decompose(matrix, rank=rank - 1)[2].frobenius > tolerance * norm).any()


def test_decomposition_feeds_attention():
    """A smooth bias at a small rank; the error of the output is bounded by that of the scores: 2 max|v| (exp(2e) - 1)."""
    distance = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None] - torch.linspace(0, 1, 60, dtype=torch.float64)
    matrix = 2 * torch.exp(-distance.square())
    q_bias, k_bias, error = decompose(matrix, tolerance=1e-3)
    assert q_bias.shape[1] <= 4
    q, k, v = (t.detach() for t in tokens(queries=40, keys=60))
    got = flash_bias(q, k, v, q_bias[None, None], k_bias[None, None])
    expected = dense_attention(q, k, v, matrix, torch.eye(60, dtype=torch.float64))
    assert 0 < (got - expected).abs().max() < 2 * v.abs().max() * torch.expm1(2 * error.maximum)


def test_factors_keep_dtype_and_count_their_rounding():
    q_bias, _, error = decompose(normal(6, 9, dtype=torch.float32), rank=6)
    assert q_bias.dtype == torch.float32 and 0 < error.frobenius < 1e-5
    assert decompose(torch.zeros(4, 6), tolerance=0.01)[0].shape == (4, 1)


@pytest.mark.parametrize("matrix, options, text", [
    (torch.ones(3, 4), {}, "give a rank or a tolerance"),
    (torch.ones(3, 4), dict(rank=1, tolerance=0.1), "give a rank or a tolerance"),
    (torch.ones(3, 4), dict(rank=4), r"rank must lie in 1...3"),
    (torch.ones(3, 4), dict(rank=0), "rank must lie"),
    (torch.ones(3, 4), dict(tolerance=-0.1), "tolerance be 0 or more"),
    (torch.ones(3, 4), dict(tolerance=math.nan), "tolerance be 0 or more"),
    (torch.ones(4), dict(rank=1), "bias must be"),
    (torch.full((3, 4), math.inf), dict(rank=1), "all finite"),
    (torch.ones(0, 4), dict(rank=1), "bias must be"),
    (torch.ones(3, 4), dict(rank=2.5), "rank must lie in 1...3, whole"),
    (torch.tensor([[1, 2, 3], [2, 4, 6]]), dict(rank=1), "floating-point dtype.* got torch.int64"),
    ([[1.0]], dict(rank=1), "bias must be a tensor, got list"),
])
def test_decompose_refuses(matrix, options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        decompose(matrix, **options)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_flex_on_a_cpu(name, kind):
    layout = LAYOUTS[name]
    q, k, v = (t.detach() for t in tokens(keys=layout.num_keys))
    value = normal(2, 7, 2, seed=4).requires_grad_()
    bias = LocalBias(random_windows(layout, 2, 7, [4, 3]), value, **KINDS[kind])
    out, expected = biased_attention(q, k, v, bias, backend="flex"), attention_reference(q, k, v, bias)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    (a,), (b,) = (gradients(o, (value,)) for o in (out, expected))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_flex_in_other_dtypes(dtype, tolerance):
    q, k, v = (t.detach() for t in tokens(keys=BOTH.num_keys, dtype=dtype))
    bias = LocalBias(random_windows(BOTH, 2, 7, [4, 3]), normal(2, 7, 2, dtype=torch.float32), sigma=(1.0, 2.0))
    out = biased_attention(q, k, v, bias, backend="flex")
    assert out.dtype == dtype
    expected = attention_reference(q.double(), k.double(), v.double(), bias)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("biased", [False, True])
def test_flex_with_masks(biased):
    q, k, v = (t.detach() for t in tokens(keys=BOTH.num_keys))
    g = torch.Generator().manual_seed(3)
    attn_mask, key_mask = (torch.rand(*shape, BOTH.num_keys, generator=g) < 0.4 for shape in ((7,), (2,)))
    attn_mask[3] = True
    bias = LocalBias(random_windows(BOTH, 2, 7, [4, 3]), normal(2, 7, 2)) if biased else None
    for masks in (dict(attn_mask=attn_mask), dict(key_mask=key_mask), dict(attn_mask=attn_mask, key_mask=key_mask)):
        out, expected = (biased_attention(q, k, v, bias, backend=b, **masks) for b in ("flex", "reference"))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        assert "attn_mask" not in masks or torch.count_nonzero(out[:, :, 3]) == 0


def test_flex_takes_tensors_that_could_have_gradients_when_none_are_wanted():
    q, k, v = tokens()
    with torch.no_grad():
        out = flex_biased_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out, attention_reference(q, k, v, scale=0.3).detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend, change, error, text", [
    ("flex", {}, RuntimeError, "no gradients of q, k and v on cpu"),
    ("flex", dict(dropout_p=0.1), RuntimeError, "does not drop probabilities"),
    ("flex", dict(k=normal(2, 3, 50, 8, dtype=torch.float32)), ValueError, "one floating-point dtype"),
    ("flex", dict(k=normal(2, 3, 0, 8), v=normal(2, 3, 0, 8)), RuntimeError, "at least one query and one key, got 7 and 0"),
    ("flex", dict(attn_mask=torch.zeros(7, 9, dtype=torch.bool), q=normal(2, 3, 7, 8)), ValueError, "attn_mask must be"),
    ("flash_attn", {}, RuntimeError, "flash-attn package is not installed|needs a GPU"),
    ("flash_attn", dict(attn_mask=torch.zeros(7, 50, dtype=torch.bool)), RuntimeError, "takes no attn_mask and no key_mask"),
    ("flash_attn", dict(key_mask=torch.zeros(2, 50, dtype=torch.bool)), RuntimeError, "takes no attn_mask and no key_mask"),
    ("flash", {}, ValueError, "choose one of 'auto', 'triton', 'sdpa', 'flex', 'flash_attn', 'reference'"),
])
def test_backends_refuse(backend, change, error, text):
    q, k, v = tokens()
    k, v = k.detach(), v.detach()
    with pytest.raises(error, match=text):
        biased_attention(**(dict(q=q, k=k, v=v, backend=backend) | change))


def test_flash_attn_refuses_a_local_bias():
    q, k, v = tokens(keys=BOTH.num_keys)
    bias = LocalBias(random_windows(BOTH, 2, 7, 3), torch.zeros(2, 7, 2))
    with pytest.raises(RuntimeError, match="a local bias is not of low rank"):
        biased_attention(q, k, v, bias, backend="flash_attn")


@pytest.mark.parametrize("biased", [False, True])
def test_flash_attn_is_called_as_documented(monkeypatch, biased):
    """A stand-in that computes what the package documents: [B, N, H, D], even channels, its own scale."""
    seen = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, deterministic=False):
        seen.append((q.shape, v.shape, softmax_scale, deterministic))
        assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and dropout_p == 0
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=softmax_scale).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(lowrank, "_flash_obstacle", lambda *args: None)
    q, k, v = tokens(keys=BOTH.num_keys, dim=12)
    value = normal(2, 7, 2).requires_grad_()
    bias = LocalBias(random_windows(BOTH, 2, 7, 3), value, is_global=True) if biased else None
    inputs = (q, k, v, value) if biased else (q, k, v)
    out, expected = (biased_attention(q, k, v, bias, backend=b) for b in ("flash_attn", "reference"))
    assert seen == [((2, 7, 3, 16), (2, BOTH.num_keys, 3, 16), 12 ** -0.5, True)]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(lowrank, "_FLASH_ATTN", False)
    with pytest.raises(RuntimeError, match="not installed: pip install flash-attn"):
        biased_attention(*tokens(), backend="flash_attn")
    monkeypatch.setattr(lowrank, "_FLASH_ATTN", True)
    with pytest.raises(RuntimeError, match="needs a GPU, and the tensors are on cpu"):
        biased_attention(*tokens(), backend="flash_attn")


def test_auto_takes_extra_channels_only_for_a_bare_global_bias_on_a_gpu(monkeypatch):
    q, k, v = tokens(keys=BOTH.num_keys)
    windows = random_windows(BOTH, 2, 7, 3)
    local, everywhere = (LocalBias(windows, normal(2, 7, 2), is_global=g) for g in (False, True))
    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    double = types.SimpleNamespace(is_cuda=True, dtype=torch.float64)
    assert dispatch._low_rank(gpu, k, everywhere, None)
    assert not any([dispatch._low_rank(gpu, k, local, None), dispatch._low_rank(q, k, everywhere, None),
                    dispatch._low_rank(gpu, k, everywhere, torch.zeros(7, BOTH.num_keys, dtype=torch.bool)),
                    dispatch._low_rank(double, k, everywhere, None), dispatch._low_rank(gpu, k[:, :, :0], everywhere, None)])
    monkeypatch.setattr(dispatch, "_low_rank", lambda *args: True)
    called = []
    monkeypatch.setattr(dispatch, "flash_bias", lambda *args, **kwargs: called.append(kwargs) or flash_bias(*args, **kwargs))
    out, expected = biased_attention(q, k, v, everywhere), attention_reference(q, k, v, everywhere)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert called == [dict(split=True, dropout_p=0.0)]


LARGE = TokenLayout(lidar=(40, 50), camera=(4, 20, 25))                              # 4,000 keys


def large_problem(device, dim, dtype, kind):
    windows = random_windows(LARGE, 2, 1000, [8, 5], device=device)
    inputs = [t.detach().to(device).requires_grad_() for t in tokens(2, 4, 1000, LARGE.num_keys, dim, dtype)]
    inputs.append((5 * torch.tanh(normal(2, 1000, 2, seed=4))).float().to(device).requires_grad_())

    def run(attend, double=False):
        """Output and gradients of q, k, v and value, float64."""
        tensors = [t.detach().double().requires_grad_() for t in inputs] if double else inputs
        out = attend(*tensors[:3], LocalBias(windows, tensors[3], **KINDS[kind]))
        return [t.double() for t in (out.detach(), *gradients(out, tensors))]
    return run


def check_errors(got, plain, exact):
    """Outputs within twice, gradients within three times the error of PyTorch's own attention with the dense bias."""
    for i, (a, b, c) in enumerate(zip(got, plain, exact)):
        ours, theirs = ((t - c).square().mean().sqrt().item() for t in (a, b))
        assert ours <= (3 if i else 2) * theirs, (i, ours, theirs)


def dense_sdpa(q, k, v, bias):
    return biased_attention(q, k, v, bias, backend="sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "efficient", "flash_attn"])
def test_gpu_flash_bias(cuda, backend, dim, dtype):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="needs the flash-attn package: pip install flash-attn")
    run = large_problem(cuda, dim, dtype, "global")
    got = run(lambda q, k, v, bias: flash_bias(q, k, v, *global_bias_factors(bias), backend=backend, split=True))
    check_errors(got, run(dense_sdpa), run(attention_reference, double=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind, dim", [("uniform", 32), ("gaussian", 32), ("global", 32), ("uniform", 64)])
def test_gpu_flex(cuda, kind, dim):
    torch._dynamo.reset()
    run = large_problem(cuda, dim, torch.bfloat16, kind)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    got = run(lambda q, k, v, bias: biased_attention(q, k, v, bias, backend="flex"))
    assert torch.cuda.max_memory_allocated() - before < 2 * 4 * 1000 * LARGE.num_keys * 4, "a matrix of the scores was held"
    check_errors(got, run(dense_sdpa), run(attention_reference, double=True))


@pytest.mark.gpu
def test_gpu_flex_with_a_mask(cuda):
    torch._dynamo.reset()
    mask = torch.rand(1000, LARGE.num_keys, generator=torch.Generator().manual_seed(0)).to(cuda) < 0.5
    mask[10] = True
    run = large_problem(cuda, 32, torch.bfloat16, "uniform")
    got, plain, exact = (run(lambda q, k, v, bias: biased_attention(q, k, v, bias, mask, backend=b), double=b == "reference")
                         for b in ("flex", "sdpa", "reference"))
    assert all(t.isfinite().all() for t in got) and torch.count_nonzero(got[0][:, :, 10]) == 0
    check_errors(got, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_gpu_auto_without_triton(cuda, monkeypatch, dtype):
    """A global bias then goes through PyTorch's kernels, within rounding."""
    monkeypatch.setattr("cmtaqr.geometry._TRITON", False)
    called = []
    monkeypatch.setattr(dispatch, "flash_bias", lambda *args, **kwargs: called.append(1) or flash_bias(*args, **kwargs))
    run = large_problem(cuda, 32, dtype, "global")
    got = run(biased_attention)
    assert called
    check_errors(got, run(dense_sdpa), run(attention_reference, double=True))


@pytest.mark.gpu
def test_gpu_backends_refuse(cuda):
    q, k, v = (t.detach().to(cuda) for t in tokens(dim=16))
    pair = [f.detach().to(cuda) for f in factors()]
    for backend in ("flash", "cudnn"):
        with pytest.raises(RuntimeError, match="computes in float16 and bfloat16, got torch.float64"):
            flash_bias(q, k, v, *pair, backend=backend)
    wide = [t.repeat(1, 1, 1, 16).half() for t in (q, k, v)]
    with pytest.raises(RuntimeError, match="256 channels at most, and head dimension, factors and padding make 264"):
        flash_bias(*wide, *pair, backend="flash")
    with pytest.raises(RuntimeError, match="got torch.float64"):
        biased_attention(q, k, v, backend="flex")
    with pytest.raises(RuntimeError, match="head dimension of at least 16, got 8"):
        biased_attention(*(t[..., :8].half() for t in (q, k, v)), backend="flex")
