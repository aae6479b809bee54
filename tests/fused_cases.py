"""Cases of the fused attention kernels and their errors against float64.

Run as a script it prints them as JSON lines: those of the CPU; with the argument `gpu` those of the GPU, many at a time; with
`shared` the shared memory that every kernel takes on a chip that has little of it."""
import json
import math
import multiprocessing
import os
import sys
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget

from cmtaqr.attention import attention_reference, biased_attention, fused, plan
from cmtaqr.attention.fused import Launch, attention_backward_op, attention_op, plan_op
from cmtaqr.attention.plan import layout_numbers
from cmtaqr.bias import AttentionBiasGenerator, LocalBias
from cmtaqr.geometry import TokenLayout
from window_cases import CAMERA, LIDAR, SMALL, TINY, border_windows, empty, in_memory, overlapping, poisoned, random_windows

KINDS = {"none": None, "uniform": {}, "gaussian": dict(sigma=(1.0, 2.5)), "global": dict(is_global=True)}
INPUTS = "q", "k", "v", "value"
# Many small steps: several blocks of queries and tiles of keys on the smallest maps, and every way to split the keys.
STEPS = dict(block=16, tile=16)


@contextmanager
def launched(block=fused.BLOCK, tile=fused.TILE, **settings):
    """Launch the kernels in a given way for a while: queries and keys per step, and fields of `Launch`."""
    changes = dict(launch_for=lambda dim, dtype: Launch(**settings)) if settings else {}
    with mock.patch.multiple(fused, BLOCK=block, TILE=tile, **changes):
        yield


def random_inputs(windows, heads=2, dim=16, dtype=torch.float32, seed=0, spread=1.0, limit=5.0, offset=0.0):
    """q, k, v, value (up to ±limit) and gradient of the output; an offset lowers all q·k by its square."""
    device, (batch, queries) = windows.cells.device, windows.seen.shape[:2]
    g = torch.Generator(device).manual_seed(seed)
    lengths = queries, windows.layout.num_keys, windows.layout.num_keys, queries
    q, k, v, grad = (torch.randn(batch, heads, n, dim, device=device, generator=g).to(dtype) for n in lengths)
    if offset:
        q[..., 0], k[..., 0] = offset, -offset
    return q * spread, k, v, (2 * torch.rand(batch, queries, 2, device=device, generator=g) - 1) * limit, grad


def random_mask(windows, seed=0):
    """Three of ten keys ignored, and all of the last sample's where there are several samples."""
    batch = len(windows.cells)
    mask = torch.rand(batch, windows.layout.num_keys, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[batch - 1] |= batch > 1
    return mask.to(windows.cells.device)


def errors_of(results):
    """{name: [largest error of the kernels, of plain torch, largest exact value, root mean square errors of the kernels, of plain
    torch]} from {name: (kernels, plain, exact)}."""
    errors = {}
    for name, (ours, plain, exact) in results.items():
        assert ours.shape == exact.shape and ours.dtype == plain.dtype, name
        largest = [float(t.abs().max()) if t.numel() else 0.0 for t in (ours.double() - exact, plain.double() - exact, exact)]
        means = [float((t.double() - exact).square().mean().sqrt()) if t.numel() else 0.0 for t in (ours, plain)]
        errors[name] = [*largest, *means]
    return errors


def allowed_error(name, plain, largest, floor):
    """Twice (output) or three times (gradients) torch's own error, and a share `floor` of the largest value; never half of that
    value, which an all-zero result is further off. Where all terms cancel, as in the score's gradient for a single key, the
    exact value is 0 but for float64's rounding, and the share is that of 1."""
    if largest < 1e-9:
        return floor
    return min((2 if name == "out" else 3) * plain + floor * largest, largest / 2)


def measure(windows, kind="uniform", heads=2, dim=16, dtype=torch.float32, needs=(True,) * 4, memory="heads inside", masked=False,
            launch=None, given_layout=True, **options):
    """Largest errors of the fused kernels and of torch's attention with a dense bias in the same dtype, against float64.

    Returns:
        `errors_of` the output and of the gradients that `needs` (q, k, v, value) asks for. Zeros are checked here.
    """
    *tensors, grad = random_inputs(windows, heads, dim, dtype, **options)
    grad, mask, settings = in_memory(grad, memory), random_mask(windows) if masked else None, KINDS[kind]
    blocked = None if mask is None else mask[:, None].expand(-1, len(grad[0, 0]), -1)
    needs, layout = needs if settings is not None else (*needs[:3], False), windows.layout if given_layout else None
    # probabilities of 1/56,400 lose digits in fp16, which torch's math kernel, inwardly in fp32, does not know; its fused one does
    kernels = [SDPBackend.EFFICIENT_ATTENTION] * (dtype == torch.float16 and windows.layout.num_keys > 2**15) + [SDPBackend.MATH]
    results = []
    for way in ("triton", "plain", "exact"):
        inputs = [t.double() if way == "exact" else t.clone() for t in tensors]
        inputs[:3] = (in_memory(t, memory) for t in inputs[:3])
        inputs = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs)]
        q, k, v, value = inputs
        bias = None if settings is None else LocalBias(windows, value, **settings)
        with launched(**(launch or {})):
            if way == "triton":
                out = biased_attention(q, k, v, bias, backend="triton", key_mask=mask, layout=layout)
            elif way == "plain":
                with sdpa_kernel(kernels):  # the math kernel takes every size
                    out = biased_attention(q, k, v, bias, backend="sdpa", key_mask=mask)
            else:
                out = attention_reference(q, k, v, bias, blocked)
            asked = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(out, asked, grad.to(out.dtype)) if asked else ())
        results.append({"out": out.detach(), **{f"d{n}": next(found) for n, need in zip(INPUTS, needs) if need}})
    ours = results[0]
    if masked and len(windows.cells) > 1:
        assert all(torch.count_nonzero(t[-1]) == 0 for t in ours.values()), "a sample all of whose keys are ignored"
    if "dvalue" in ours and kind != "global":
        box = windows.bounds()
        there = (box[..., 1::2] > box[..., ::2]).all(-1)
        lidar_maps = windows.layout.num_maps - windows.layout.num_views
        there = torch.stack([there[..., :lidar_maps].any(-1), there[..., lidar_maps:].any(-1)], -1)
        assert torch.count_nonzero(ours["dvalue"][~there]) == 0, "the value of an empty window"
    return errors_of({name: [r[name] for r in results] for name in ours})


def generator_errors(scale, device="cpu", dim=16, dtype=torch.float32, launch=STEPS, **options):
    """Errors through the bias generator: weights of -1, 1 and between, its scale at a bound; of their gradients too.

    The scale's gradient is one number, a sum of weights times gradients of values, in which torch may be right by luck: as its
    error counts at least what the errors of its summands, adding up at random, come to.
    """
    windows = random_windows(TINY, 2, 20, 1, share=0.7, device=device)
    q, k, v, weights, grad = random_inputs(windows, 1, dim, dtype, limit=1.0)
    weights[:, ::3] = weights[:, ::3].sign()
    results = []
    for way, backend in (("triton", "triton"), ("plain", "sdpa"), ("exact", "reference")):
        generator = AttentionBiasGenerator([2, 3], bias_scale=scale, min_scale=0.5, max_scale=5.0, **options).to(device)
        inputs = [(t.double() if way == "exact" else t).clone().requires_grad_() for t in (q, k, v, weights)]
        generator = generator.double() if way == "exact" else generator
        bias = generator(inputs[3], windows)
        # from forward to backward pass: the order of the queries is made of blocks of one size
        with launched(**(launch or {})), sdpa_kernel(SDPBackend.MATH):
            out = biased_attention(*inputs[:3], bias, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, (*inputs, generator.bias_scale), grad.to(out.dtype))])
    assert torch.count_nonzero(results[0][4]) > 0 and (results[0][5] != 0) == (results[2][5] != 0)
    errors = errors_of(dict(zip(("out", "dq", "dk", "dv", "dweights", "dscale"), zip(*results))))
    expected = errors["dweights"][4] * float(weights.norm()) / scale
    errors["dscale"][1], errors["dscale"][4] = (max(errors["dscale"][i], expected) for i in (1, 4))
    return errors


def small(queries=20, batch=1, layout=SMALL, share=0.6, device="cpu", sizes=(4, 3), **options):
    return random_windows(layout, batch, queries, list(sizes), share=share, device=device, **options)


def moved(windows, device):
    return type(windows)(windows.layout, windows.cells.to(device), windows.seen.to(device), windows.sizes)


def _cases(**always):
    def case(windows, **options):
        return lambda device: measure(moved(windows(), device), **{"launch": STEPS, "heads": 1, **options, **always})

    cases = {}
    for kind in KINDS:
        cases[f"{kind}, default launch, 70 queries"] = case(lambda: small(70, layout=TINY), kind=kind, launch=None)
        cases[f"{kind}, small steps, batch 2, masked"] = case(lambda: small(20, 2, TINY), kind=kind, masked=True, heads=2)
        cases[f"{kind}, LiDAR alone"] = case(lambda: border_windows(LIDAR, [4, 3]), kind=kind)
        cases[f"{kind}, cameras alone"] = case(lambda: border_windows(CAMERA, [4, 3]), kind=kind)
        cases[f"{kind}, float16"] = case(small, kind=kind, dtype=torch.float16)
        cases[f"{kind}, bfloat16"] = case(small, kind=kind, dtype=torch.bfloat16)
    for kind in ("uniform", "gaussian"):
        for even, odd in (([4, 5], "even and odd"), ([3, 2], "odd and even")):
            cases[f"{kind}, borders, {odd}"] = case(lambda even=even: border_windows(SMALL, even), kind=kind)
        cases[f"{kind}, larger than the maps"] = case(lambda: border_windows(TINY, [9, 12]), kind=kind)
        cases[f"{kind}, empty"] = case(empty, kind=kind)
    cases.update({
        "no bias, no layout": case(small, kind="none", given_layout=False),
        "no bias, no layout, masked": case(lambda: small(20, 2, TINY), kind="none", given_layout=False, masked=True),
        "one query": case(lambda: small(1, share=1.0), launch=None),
        "63 queries": case(lambda: small(63), launch=None),
        "one key": case(lambda: random_windows(TokenLayout((1, 1), None), 1, 3, 1), launch=None),
        "one key, global": case(lambda: random_windows(TokenLayout((1, 1), None), 1, 3, 1), kind="global"),
        "one row": case(lambda: small(layout=TokenLayout((1, 70), (2, 30, 1)))),
        "keys of whole tiles": case(lambda: small(layout=TokenLayout((8, 8), (2, 4, 16)))),
        "larger than the maps, even": case(lambda: border_windows(TINY, [8, 6])),
        "every view": case(overlapping, kind="gaussian"),
        "batch 3, three heads": case(lambda: small(18, 3, TINY), masked=True, heads=3, launch=None),
        "single cells": case(lambda: border_windows(TINY, 1)),
        "one camera": case(lambda: border_windows(TokenLayout(None, (1, 6, 10)), [4, 3])),
        "sharp scores": case(small, spread=4.0),
        "sharp scores, global": case(lambda: small(layout=TINY), spread=4.0, kind="global"),
        "steep bias": case(small, limit=10.0, kind="gaussian"),
        "splits: one": case(small, launch=dict(block=16, tile=16, occupancy=1)),
        "splits: eight": case(small, launch=dict(block=16, tile=16, occupancy=100)),
        "splits: eight, global": case(lambda: small(layout=TINY), launch=dict(block=16, tile=16, occupancy=100), kind="global"),
        "blocks of 64, tiles of 16": case(lambda: small(70), launch=dict(block=64, tile=16)),
        "blocks of 16, tiles of 64": case(lambda: small(70), launch=dict(block=16, tile=64)),
        "more than 32 blocks": case(lambda: small(520, layout=TokenLayout((16, 4), None), sizes=(1, 2))),
        **{f"head dimension {dim}": case(small, dim=dim, launch=None) for dim in (32, 64, 128)},
        **{f"in memory: {kind}": case(lambda: small(layout=TINY), memory=kind)
           for kind in ("heads outside", "sliced", "channels outside")},
    })
    for needs in [tuple(bool(i >> j & 1) for j in range(4)) for i in range(15)]:
        wanted = ", ".join(n for n, need in zip(INPUTS, needs) if need) or "nothing"
        cases[f"gradients of {wanted}"] = case(lambda: small(layout=TINY), needs=needs)
    for scale in (0.5, 5.0):
        for options in ({}, dict(use_gaussian_window=True), dict(use_local_bias=False)):
            cases[f"generator, scale {scale}, {' '.join(options) or 'uniform'}"] = partial(generator_errors, scale, **options, **always)
    return cases


CASES = _cases()
# Windows, gradients and generator once more on the GPU, launched and computed as in the detector.
USUAL = dict(launch=None, dim=32, dtype=torch.bfloat16)
USUAL_CASES = {name: case for name, case in _cases(**USUAL).items()
               if any(word in name for word in ("borders", "alone", "larger", "empty", "every view", "gradients", "generator"))}


def computed(inputs, grad, bias, attend=None, **options):
    """Output and gradients of all inputs that want one."""
    attend = attend or (lambda q, k, v, bias: biased_attention(q, k, v, bias, backend="triton", **options))
    out = attend(*inputs[:3], bias)
    return out.detach(), *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_operator(device="cpu"):
    """PyTorch's own checks of the operators; traced as a whole, repeated and recomputed they give the same bits."""
    windows = small(5, layout=TINY, sizes=(2, 3), share=0.8, device=device)
    for kind, settings in KINDS.items():
        *inputs, grad = random_inputs(windows, heads=1)
        inputs = [t.requires_grad_() for t in inputs]

        def attend(q, k, v, value, settings=settings):
            bias = None if settings is None else LocalBias(windows, value, **settings)
            return biased_attention(q, k, v, bias, backend="triton", layout=windows.layout)

        results, asked = [], inputs if settings is not None else inputs[:3]
        ways = (attend, attend, torch.compile(attend, fullgraph=True, backend="aot_eager"),
                lambda *t: torch.utils.checkpoint.checkpoint(attend, *t, use_reentrant=False))
        for way in ways:
            out = way(*inputs)
            results.append([out.detach(), *torch.autograd.grad(out, asked, grad)])
        assert all(same_bits(results[0], other) for other in results[1:]), kind
        # nothing is recorded where nothing wants a gradient
        assert attend(*(t.detach() for t in inputs)).grad_fn is None
    for kind, settings in (("uniform", KINDS["uniform"]), ("none", None)):
        *inputs, grad = random_inputs(windows, heads=1)
        q, k, v, value = (t.requires_grad_() for t in inputs)
        nothing, layout = value.new_empty(0), layout_numbers(windows)
        plan = plan_op(windows.cells, windows.seen, layout, 64, 64) if settings is not None else [nothing] * 3
        biased = settings is not None
        tensors, rest = (value if biased else nothing, *plan, nothing), (layout, [0.0, 0.0], list(KINDS).index(kind), 0.25)
        torch.library.opcheck(attention_op, (q, k, v, *tensors, *rest))
        outputs = attention_op(q, k, v, *tensors, *rest)
        for wants in ([True, True, True, biased], [False, True, False, False], [True, False, False, False]):
            arguments = [t.detach() for t in (grad, q, k, v, *tensors, *outputs[1:])]
            checks = "test_schema", "test_faketensor"
            torch.library.opcheck(attention_backward_op, (*arguments, *rest, wants), test_utils=checks)
    torch.library.opcheck(plan_op, (windows.cells, windows.seen, layout, 16, 16))


def check_zero_bias(device="cpu"):
    """Without a bias, but with the layout given: the bits of a bias of 0, in the output and in the gradient of the queries."""
    # keys sum over the queries, which a window puts in another order; numpy, the interpreter's, rounds a row by its place in a block
    for dtype, kinds, tolerance in ((torch.float32, list(KINDS)[1:], 1e-6), (torch.float16, ["uniform"], 2e-3)):
        windows = small(20, 2, TINY, device=device)
        *inputs, grad = random_inputs(windows, heads=1, dtype=dtype)
        inputs, zero = [t.requires_grad_() for t in inputs[:3]], torch.zeros(2, 20, 2, device=device)
        for mask in (None, random_mask(windows)) if dtype == torch.float32 else (None,):
            with launched(**STEPS):
                plain = computed(inputs, grad, None, layout=windows.layout, key_mask=mask)
                for kind in kinds if mask is None else kinds[:1]:
                    biased = computed(inputs, grad, LocalBias(windows, zero, **KINDS[kind]), key_mask=mask)
                    assert str(device) == "cpu" and kind != "global" or same_bits(plain[:2], biased[:2]), (dtype, kind)
                    for a, b in zip(plain, biased):
                        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


def check_empty_sizes(device="cpu"):
    """No keys, no queries, no samples: zeros, and gradients of their shapes."""
    for batch, queries, keys in ((2, 5, 0), (2, 0, 7), (0, 5, 7), (2, 0, 0)):
        inputs = [torch.randn(batch, 2, n, 16, device=device, requires_grad=True) for n in (queries, keys, keys)]
        out, *gradients = computed(inputs, torch.ones_like(inputs[0]), None)
        assert out.shape == inputs[0].shape and torch.count_nonzero(out) == 0
        assert all(a.shape == b.shape and torch.count_nonzero(a) == 0 for a, b in zip(gradients, inputs))
    for batch, queries in ((2, 0), (0, 5)):
        windows = small(queries, batch, device=device)
        for settings in KINDS.values():
            *inputs, grad = random_inputs(windows)
            inputs = [t.requires_grad_() for t in (inputs if settings is not None else inputs[:3])]
            results = computed(inputs, grad, None if settings is None else LocalBias(windows, inputs[3], **settings))
            assert all(a.shape == b.shape and torch.count_nonzero(a) == 0 for a, b in zip(results, (inputs[0], *inputs)))


def check_plan(device="cpu"):
    """A plan made before gives the bits of the one made on the way, compiled too; one of other windows is refused."""
    windows = small(20, 1, TINY, device=device)
    *inputs, grad = random_inputs(windows, heads=1)
    bias = LocalBias(windows, inputs[3].requires_grad_())
    inputs = [t.requires_grad_() for t in inputs]
    before, expected = replace(bias, plan=fused.plan_bias(bias)), computed(inputs, grad, bias)

    def attend(q, k, v, bias):
        return biased_attention(q, k, v, bias, backend="triton")

    def plan_and_attend(q, k, v, bias):
        return attend(q, k, v, replace(bias, plan=fused.plan_bias(bias)))

    for function in (attend, plan_and_attend):
        for way in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            assert same_bits(computed(inputs, grad, before, way), expected)
    few = small(3, 1, TINY, device=device)
    others = replace(windows, cells=windows.cells.clone()), replace(windows, seen=~windows.seen), windows.resized([9, 9])
    plans = before.plan[:3], fused.plan_bias(LocalBias(few, inputs[3][:, :3]))
    for bad in (*(replace(before, windows=other) for other in others), *(replace(bias, plan=plan) for plan in plans)):
        try:
            computed(inputs, grad, bad)
        except ValueError as error:
            assert "made for other windows" in str(error), error
        else:
            raise AssertionError("a plan of other windows was taken")


def check_current_device(device="cpu"):
    """All kernels are launched while the device of their tensors is the current one, which Triton launches on."""
    windows = small(20, 1, TINY, device=device)
    *inputs, grad = random_inputs(windows, heads=1)
    inputs, entered, launches = [t.requires_grad_() for t in inputs], [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def watched(kernel):
        stand_in = mock.MagicMock()
        stand_in.__getitem__.side_effect = lambda grid: launches.append(len(entered)) or kernel[grid]
        return stand_in

    names = {fused: ("_forward", "_merge", "_prepare", "_query_gradients", "_collect", "_key_gradients"),
             plan: ("_sort_keys", "_rank", "_place")}
    with mock.patch.object(torch.cuda, "device_of", device_of), ExitStack() as patches:
        for module, kernels in names.items():
            patches.enter_context(mock.patch.multiple(module, **{name: watched(getattr(module, name)) for name in kernels}))
        computed(inputs, grad, LocalBias(windows, inputs[3]))
    assert launches == [1] * 9


def check_second_derivatives(device="cpu"):
    """Refused in words by both ways to the kernels, past the dispatcher and through it; first ones may be recorded."""
    windows = small(20, 1, TINY, device=device)
    *inputs, grad = random_inputs(windows, heads=1)
    inputs = [t.requires_grad_() for t in inputs]
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        with mode:
            out = biased_attention(*inputs[:3], LocalBias(windows, inputs[3]), backend="triton")
            first = torch.autograd.grad(out, inputs, grad, create_graph=True)
            assert same_bits(first, torch.autograd.grad(out, inputs, grad, retain_graph=True))
            for ask in (lambda: torch.autograd.grad(first[3].square().sum(), inputs[0], retain_graph=True),
                        lambda: (out.sum() + first[0].sum()).backward()):
                try:
                    ask()
                except RuntimeError as error:
                    assert "no second derivatives" in str(error), error
                else:
                    raise AssertionError("a second derivative was given")


def check_nan_value(device="cpu"):
    """NaN or infinity as a query's value: NaN for that query, whether or not it has a window, the bits as ever for all others."""
    for kind in ("uniform", "gaussian", "global"):
        windows = small(20, 1, TINY, device=device)
        *inputs, grad = random_inputs(windows, heads=1)
        inputs = [t.requires_grad_() for t in inputs]
        broken, bad = inputs[3].detach().clone(), torch.zeros(1, 20, dtype=torch.bool, device=device)
        windows.seen[0, 3, 0] = windows.seen[0, 17, 1] = True
        windows.cells[0, 3, 0] = windows.cells[0, 17, 1] = 2
        broken[0, 3, 0] = broken[0, 17, 1] = math.nan
        bad[0, [3, 17]] = True
        if kind != "global":
            windows.seen[0, [5, 6]] = False
        broken[0, 5, 0], broken[0, 6, 1] = math.inf if kind == "global" else math.nan, math.inf
        bad[0, [5, 6]] = True
        with launched(**STEPS):
            fine = computed(inputs, grad, LocalBias(windows, inputs[3], **KINDS[kind]))
            inputs[3] = broken.requires_grad_()
            found = computed(inputs, grad, LocalBias(windows, broken, **KINDS[kind]))
        for name, a, b in (("out", fine[0], found[0]), ("dq", fine[1], found[1])):
            a, b = a.transpose(1, 2), b.transpose(1, 2)
            assert b[bad].isnan().all() and torch.equal(a[~bad], b[~bad]), (kind, name)
        assert torch.equal(fine[4][~bad], found[4][~bad]) and found[4][0, [3, 17]].isnan().any(-1).all()


def check_lowest_value(device="cpu"):
    """The lowest number as a query's LiDAR value, and -inf under a global bias: the sensor is gone, and nothing is NaN."""
    lowest = torch.finfo(torch.float32).min
    for kind, value in (("uniform", lowest), ("gaussian", lowest), ("global", lowest), ("global", -math.inf)):
        windows = small(20, 1, TINY, device=device)
        *inputs, grad = random_inputs(windows, heads=1)
        inputs[3][0, ::2, 0] = value
        inputs = [t.requires_grad_() for t in inputs]
        with launched(**STEPS):
            found = computed(inputs, grad, LocalBias(windows, inputs[3], **KINDS[kind]))
        wide = [t.detach().double().requires_grad_() for t in inputs]
        out = attention_reference(*wide[:3], LocalBias(windows, wide[3], **KINDS[kind]))
        expected = out, *torch.autograd.grad(out, wide, grad.double())
        for a, b in zip(found, expected):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    windows = small(20, 1, LIDAR, device=device)
    *inputs, grad = random_inputs(windows, heads=1)
    inputs = [t.requires_grad_() for t in (*inputs[:3], torch.full_like(inputs[3], lowest))]
    assert all(t.isfinite().all() for t in computed(inputs, grad, LocalBias(windows, inputs[3], is_global=True)))


def check_far_windows(device="cpu"):
    """Cells outside the maps and windows larger than they, however far and large: what remains of the window after clipping, as
    `Windows.bounds` says."""
    for far, sizes in ((3, (4, 3)), (10**6, (4, 3)), (2**40, (4, 3)), (3, (2**31 - 1, 2**31)), (3, (2**40, 2**40 + 1))):
        windows = small(16, device=device, sizes=sizes)
        windows.cells.copy_(torch.randint(-far, far + 1, windows.cells.shape, generator=torch.Generator().manual_seed(far)))
        windows.cells[0, :4] = torch.tensor([[-2, 3], [-1, -1], [9, 12], [10, 2]], device=device)[:, None]
        windows.cells[0, 4] += 2**32 * (max(sizes) < 2**22)
        windows.seen[:] = True
        errors = measure(windows, heads=1, launch=STEPS)
        for name, (ours, plain, largest, *_) in errors.items():
            assert ours <= allowed_error(name, plain, largest, 2**-19), (far, sizes, name, ours, plain, largest)


def check_low_scores(device="cpu"):
    """All scores of a query far below 0, which softmax does not notice: the score 0 of keys beyond a map's end must not count."""
    for dtype, offset, kinds in ((torch.float16, 14.0, KINDS), (torch.float32, 40.0, ("none", "uniform"))):
        for kind in kinds:
            errors = measure(small(20, layout=TINY, device=device), kind, 1, dtype=dtype, launch=STEPS, offset=offset)
            # the offset's own channel multiplies rounding errors that sum to 0 otherwise
            for name, (ours, plain, largest, *_) in errors.items():
                assert ours <= allowed_error(name, plain, largest, 1e-2), (dtype, kind, name, ours, plain, largest)


def check_poisoned_memory(device="cpu"):
    """What lay in the memory that plan and kernels ask for changes no bit."""
    for kind, settings in KINDS.items():
        windows = small(20, 2, TINY, device=device)
        *inputs, grad = random_inputs(windows, heads=1)
        inputs = [t.requires_grad_() for t in inputs[:3 + (settings is not None)]]
        mask, results = random_mask(windows) if kind in ("none", "gaussian") else None, []
        for context in (nullcontext(), poisoned()):
            with context, launched(**STEPS):
                assert not results or torch.empty(3, device=device).isnan().all()
                bias = None if settings is None else LocalBias(windows, inputs[3], **settings)
                results.append(computed(inputs, grad, bias, key_mask=mask))
        assert same_bits(*results) and all(t.isfinite().all() for t in results[0]), kind


CHECKS = {"operator": check_operator, "zero bias": check_zero_bias, "plan": check_plan, "current device": check_current_device,
          "second derivatives": check_second_derivatives, "empty sizes": check_empty_sizes, "NaN value": check_nan_value,
          "lowest value": check_lowest_value,
          "far windows": check_far_windows, "low scores": check_low_scores, "poisoned memory": check_poisoned_memory}


FULL = TokenLayout((128, 128), (6, 20, 50)), TokenLayout((180, 180), (6, 40, 100))
# Layouts of the key counts of the requirements: 1, 127, 22,384 and 56,400.
COUNTED = {1: TokenLayout((1, 1), None), 127: TokenLayout((7, 13), (2, 3, 6)), 22384: FULL[0], 56400: FULL[1]}
STEP_SIZES = (32, 32), (64, 32), (32, 128), (128, 64)
LAUNCHES = {"default": {},
            **{f"block {block}, tile {tile}": dict(block=block, tile=tile) for block, tile in STEP_SIZES},
            "any registers": dict(forward=(4, 3, None), query=(4, 3, None), key=(4, 3, None)),
            "8 warps": dict(forward=(8, 3, None), query=(8, 3, None), key=(8, 3, None)),
            "2 warps, no pipeline": dict(forward=(2, 1, None), query=(2, 1, None), key=(2, 1, None)),
            "one split": dict(occupancy=0), "eight splits": dict(occupancy=1000)}


def counted_errors(queries, keys, kind, dtype, device="cuda"):
    batch, sizes = (2 if keys < 1000 else 1), ([15, 8] if keys > 30000 else [8, 8])
    windows = random_windows(COUNTED[keys], batch, queries, sizes, share=0.4, seed=queries, device=device)
    return measure(windows, kind, 2, 32, dtype)


def launch_errors(name, device="cuda"):
    windows = random_windows(FULL[0], 1, 200, [8, 8], share=0.4, device=device)
    return measure(windows, "uniform", 2, 32, torch.bfloat16, launch=LAUNCHES[name])


LITTLE_MEMORY = 101_376    # bytes of shared memory of a program on an RTX 30 to 50, A10 or L4


def widest_errors(little_memory=False, device="cuda", queries=70):
    with mock.patch.object(fused, "_shared_memory", lambda device: LITTLE_MEMORY) if little_memory else nullcontext():
        return measure(small(queries, 2, device=device), "uniform", 2, 128, torch.float32)


def case_errors(name, usual, device="cuda"):
    return (USUAL_CASES if usual else CASES)[name](device)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The detector's numbers of keys with other dtypes, head dimensions, kinds and batches: (keys, queries, batch, dimension, ...).
LARGE = {"float32, gaussian": (22384, 900, 2, 64, FP32, "gaussian", False),
         "bfloat16, gaussian": (22384, 1100, 4, 16, BF16, "gaussian", False),
         "float16, global, masked": (22384, 63, 3, 128, FP16, "global", True),
         "float32, uniform": (56400, 900, 3, 32, FP32, "uniform", False),
         "float16, gaussian, masked": (56400, 1800, 2, 64, FP16, "gaussian", True),
         "bfloat16, global": (56400, 900, 4, 128, BF16, "global", False),
         "float32, global, masked": (56400, 1100, 2, 16, FP32, "global", True)}


def large_errors(name, device="cuda", queries=None):
    keys, usual, batch, dim, dtype, kind, masked = LARGE[name]
    windows = random_windows(COUNTED[keys], batch, queries or usual, [15, 8] if keys > 30000 else [8, 8], share=0.4, device=device)
    return measure(windows, kind, 2, dim, dtype, masked=masked)


# Triton compiles a kernel anew where a size turns 1 or a multiple of 16. Random cases keep to sizes that are neither, so that 500
# share few programs; where that is quick, some have one sample.
PROGRAMS = [(BF16, 16, "uniform", False), (BF16, 16, "global", True), (BF16, 32, "uniform", False),
            (BF16, 32, "gaussian", False), (BF16, 32, "global", False), (BF16, 32, "uniform", True),
            (BF16, 32, "none", False), (BF16, 64, "uniform", False), (BF16, 64, "gaussian", True),
            (BF16, 128, "uniform", False), (FP16, 16, "gaussian", False), (FP16, 32, "uniform", False),
            (FP16, 32, "none", True), (FP16, 64, "global", False), (FP16, 128, "gaussian", False),
            (FP32, 16, "uniform", True), (FP32, 32, "uniform", False), (FP32, 32, "gaussian", False),
            (FP32, 16, "global", False), (FP32, 64, "uniform", False)]
DRAWS = 26


def random_case(program, draw, device="cuda"):
    """Errors of one of `DRAWS` random cases of one of `PROGRAMS`."""
    dtype, dim, kind, masked = PROGRAMS[program]
    g = torch.Generator().manual_seed(1000 * program + draw)

    def between(low, high):
        while True:
            n = int(torch.randint(low, high + 1, (), generator=g))
            if n > 1 and n % 16:
                return n

    def pair(rows, cols):
        while True:
            size = between(2, rows), between(3, cols)
            if size[0] * size[1] % 16:
                return size

    layout = TokenLayout(pair(40, 60) if draw % 8 != 7 else None, (between(2, 6), *pair(20, 50)) if draw % 8 != 6 else None)
    queries, sizes = between(65, 300) if draw % 4 else between(2, 63), [between(2, 15), between(2, 12)]
    batch = 1 if dim <= 32 and draw % 6 == 5 else between(2, 4)
    windows = random_windows(layout, batch, queries, sizes, share=between(2, 9) / 10, seed=draw, device=device)
    needs = {1: (True, False, False, True), 2: (False, True, False, False), 3: (False, False, False, True)}
    memory = {1: "heads outside", 2: "sliced"}.get(draw % 5, "heads inside")
    options = dict(seed=draw, spread=between(2, 6) / 2, limit=between(2, 5))
    return measure(windows, kind, between(2, 6), dim, dtype, needs.get(draw % 7, (True,) * 4), memory, masked, **options)


def run(job):
    """(name, errors or what went wrong) of one job."""
    name, function, arguments = job
    try:
        return name, function(*arguments)
    except Exception:
        return name, traceback.format_exc()


def run_several(job):
    """The results of `run` for jobs that share a compiled program."""
    return [run(each) for each in job]


def gpu_jobs():
    """Lists of jobs; those of a list share compiled programs. The slowest to compile come first."""
    numbers = reversed(range(len(PROGRAMS)))
    jobs = [[(f"random {program}.{draw}", random_case, (program, draw)) for draw in range(DRAWS)] for program in numbers]
    for keys, kind, dtype in ((1, "uniform", FP16), (127, "gaussian", BF16), (22384, "uniform", BF16), (56400, "uniform", FP16)):
        jobs.append([(f"counted {n} x {keys}", counted_errors, (n, keys, kind, dtype)) for n in (1, 63, 900, 1100, 1800)])
    jobs += [[(f"launch {name}", launch_errors, (name,))] for name in LAUNCHES]
    jobs += [[(f"large {name}", large_errors, (name,))] for name in LARGE]
    for usual, cases in enumerate((CASES, USUAL_CASES)):
        groups = {}
        for name in cases:
            word = name.split()[0]
            groups.setdefault(word if word in ("gradients", "generator") else name, []).append(name)
        jobs += [[(f"usual {name}" if usual else f"small {name}", case_errors, (name, bool(usual))) for name in group]
                 for group in groups.values()]
    return [*([(f"dimension 128, float32{', little memory' * little}", widest_errors, (little,))] for little in (False, True)), *jobs]


class Allocated(Exception):
    """Ends a compilation once the shared memory is allocated; what follows takes minutes for fp32."""


def shared_memory(kernel, arguments, options, target):
    """Bytes of shared memory of a launch of a Triton kernel on a target."""
    from triton.backends.nvidia import compiler as nvidia
    from triton.compiler import ASTSource

    def allocate(module, metadata, settings, capability):
        steps = nvidia.ir.pass_manager(module.context)
        nvidia.passes.ttgpuir.add_combine_tensor_select_and_if(steps)
        nvidia.passes.ttgpuir.add_allocate_warp_groups(steps)
        nvidia.passes.convert.add_scf_to_cf(steps)
        nvidia.passes.gluon.add_inliner(steps)
        version = nvidia.get_ptx_version_from_options(settings, capability)
        nvidia.nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(steps, capability, version)
        steps.run(module, "allocate")
        raise Allocated(module.get_int_attr("ttg.shared"))

    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.bool: "*i1"}
    constants = {i: options.pop(p.name) for i, p in enumerate(kernel.params) if p.is_constexpr}
    signature, aligned = {p.name: "constexpr" for p in kernel.params}, {}
    for i, argument in enumerate(arguments):
        tensor = isinstance(argument, torch.Tensor)
        name = names[argument.dtype] if tensor else "fp32" if isinstance(argument, float) else "i32"
        signature[kernel.params[i].name] = name
        if tensor or name == "i32" and argument % 16 == 0:
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(i,): value for i, value in constants.items()}, aligned)
    with mock.patch.object(nvidia.CUDABackend, "make_llir", lambda self, *arguments: allocate(*arguments)):
        try:
            settings = {name: value for name, value in options.items() if value is not None}
            return triton.compile(source, target=target, options=settings).metadata.shared
        except Allocated as error:
            return error.args[0]


def shared_memory_of_launches(capability=86):
    """(name, bytes) of every kernel as it is launched, nothing being run, for all dtypes and head dimensions; of the widest rows
    also as where shared memory is plenty."""
    target, plan = GPUTarget("cuda", capability, 32), [torch.zeros(1, dtype=dtype) for dtype in (torch.int32, FP32, torch.int32)]
    names = "_forward", "_merge", "_prepare", "_query_gradients", "_collect", "_key_gradients"
    cases = [(LITTLE_MEMORY, dtype, dim) for dtype in (FP32, FP16, BF16) for dim in (16, 32, 64, 128)]
    for memory, dtype, dim in (*cases, (math.inf, FP32, 128)):
        windows, launches = small(70, 2, layout=COUNTED[127]), []
        *inputs, grad = random_inputs(windows, 8, dim, dtype)
        inputs = [t.requires_grad_() for t in inputs]

        def recorded(name, launches=launches):
            kernel, stand_in = getattr(fused, name), mock.MagicMock()
            stand_in.__getitem__.return_value = lambda *arguments, **options: launches.append((name, kernel, arguments, options))
            return stand_in

        changes = dict(_shared_memory=lambda device, memory=memory: memory, plan_windows=lambda *_: plan)
        with mock.patch.multiple(fused, **changes, **{name: recorded(name) for name in names}):
            bias = LocalBias(windows, inputs[3], **KINDS["gaussian"])
            torch.autograd.grad(fused.fused_attention(*inputs[:3], bias, random_mask(windows)), inputs, grad)
        for name, kernel, arguments, options in launches:
            yield f"{memory}, {dtype}, {dim}, {name}", shared_memory(kernel, arguments, options, target)


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:] == ["shared"]:
        for each in shared_memory_of_launches():
            print(json.dumps(each), flush=True)
    elif sys.argv[1:] == ["gpu"]:
        with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
            for results in pool.imap_unordered(run_several, gpu_jobs()):
                print(*map(json.dumps, results), sep="\n", flush=True)
    else:
        for name, function in {**CASES, **CHECKS}.items():
            print(json.dumps(run((name, function, ("cpu",)))), flush=True)
