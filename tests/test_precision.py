"""Mixed precision of the whole detector: islands stay fp32, losses stay near fp32, nothing becomes NaN."""
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")

from mmengine.structures import InstanceData  # noqa: E402

from cmtaqr.detector.decoder import PETRMultiheadAttention  # noqa: E402
from cmtaqr.detector.losses import encode_boxes  # noqa: E402
from cmtaqr.detector.precision import FP32_ISLANDS, autocast, island, recorded_islands  # noqa: E402
from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.runner import MixedPrecisionWrapper  # noqa: E402
from cmtaqr.engine.stages import copied, speed_frame, speed_model  # noqa: E402
from mmdet3d.structures import LiDARInstance3DBoxes  # noqa: E402

HALF = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


@pytest.fixture(scope="module")
def frame():
    frame = speed_frame(load_config("cmt_aqr_tiny"), turns=1)
    draw = torch.Generator().manual_seed(0)
    span, low = torch.tensor([50, 50, 1, 4, 2, 2, 6, 2, 2]), torch.tensor([-25, -25, -2, 0.5, 0.5, 0.5, 0, 0, 0])
    boxes = torch.rand(12, 9, generator=draw) * span + low
    truth = InstanceData(bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9), labels_3d=torch.randint(0, 10, (12,), generator=draw))
    frame["data_samples"][0].gt_instances_3d = truth
    return frame


@pytest.fixture(scope="module")
def model(frame):
    return speed_model(load_config("cmt_aqr_tiny"), frame, torch.device("cpu"))


def losses(model, frame, precision):
    torch.manual_seed(0)
    model.train()
    for module in model.modules():  # the same statistics in every precision
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    with autocast("cpu", precision):
        return model(**model.data_preprocessor(copied(frame), True), mode="loss")


@pytest.mark.parametrize("precision, dtype", HALF)
def test_islands_never_see_half_precision(model, frame, precision, dtype):
    outside, hooks = set(), []
    for name in ("img_backbone", "img_neck", "pts_backbone", "pts_bbox_head.shared_conv"):
        hooks.append(model.get_submodule(name).register_forward_hook(lambda m, i, out: outside.update(
            {t.dtype for t in (out if isinstance(out, (list, tuple)) else [out])})))
    with recorded_islands() as record:
        values = losses(model, frame, precision)
        with torch.no_grad(), autocast("cpu", precision):
            found = model.eval().test_step(copied(frame))[0].pred_instances_3d
    for hook in hooks:
        hook.remove()
    assert outside == {dtype}, "the rest really runs in half precision"
    assert set(record) == set(FP32_ISLANDS)
    for name, calls in record.items():
        for seen, made in calls:
            assert (seen | made) <= {torch.float32, torch.float64}, name
    assert record["losses"][0][1] == {torch.float32} and all(v.dtype == torch.float32 for v in values.values())
    assert found.scores_3d.dtype == found.bboxes_3d.tensor.dtype == torch.float32


@pytest.mark.parametrize("name, path", [("positions", "pts_bbox_head"), ("sparse encoder", ""), ("boxes", "pts_bbox_head")])
def test_a_leak_into_an_island_is_noticed(model, frame, name, path):
    """The record would show half precision if an island computed in it."""
    owner, method = model.get_submodule(path), {"positions": "positions", "sparse encoder": "sparse_map", "boxes": "boxes"}[name]
    inner = getattr(type(owner), method).__wrapped__

    def leaking(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            out = inner(self, *args, **kwargs)
        return out.bfloat16() if isinstance(out, torch.Tensor) else out

    setattr(owner, method, island(name)(leaking).__get__(owner))
    try:
        with recorded_islands() as record, torch.no_grad():
            losses(model, frame, "bf16")
    finally:
        delattr(owner, method)
    assert any(torch.bfloat16 in made for _, made in record[name])


@pytest.mark.parametrize("precision, distance", [("bf16", 0.02), ("fp16", 0.004)])
def test_losses_stay_near_fp32(model, frame, precision, distance):
    with torch.no_grad():
        full, half = (losses(model, frame, p) for p in ("fp32", precision))
    assert full.keys() == half.keys()
    total = [sum(v.item() for v in values.values()) for values in (full, half)]
    assert abs(total[1] - total[0]) < distance * total[0]
    for name in full:
        assert abs(half[name] - full[name]) < 5 * distance * max(full[name].item(), 0.1), name


@pytest.mark.parametrize("precision, dtype", HALF)
def test_steps_are_finite_and_move(frame, precision, dtype):
    model = speed_model(load_config("cmt_aqr_tiny"), frame, torch.device("cpu"))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
    wrapper = MixedPrecisionWrapper(device="cpu", precision=precision, loss_scale=1.0 if precision == "bf16" else "dynamic",
                                    optimizer=optimiser, clip_grad=dict(max_norm=35))
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    for _ in range(20):
        values = model.train_step(copied(frame), wrapper)
        assert np.isfinite(values["loss"].item())
        if wrapper.steps - wrapper.skipped == 2:
            break
    assert wrapper.steps - wrapper.skipped == 2 and (precision == "fp16" or not wrapper.skipped)
    assert wrapper.loss_scaler.get_scale() == (2.0 ** (16 - wrapper.skipped) if precision == "fp16" else 1.0)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert sum(not torch.equal(p, q) for p, q in zip(before, model.parameters())) > 0.9 * len(before)


@pytest.mark.parametrize("precision, dtype", HALF)
@pytest.mark.parametrize("biased", [False, True])
def test_large_attention_logits(precision, dtype, biased):
    """Logits of 1e4, as an untrained or a diverging model makes them: finite results and gradients, near those of fp32."""
    from cmtaqr.bias import LocalBias
    from cmtaqr.geometry import TokenLayout, Windows
    torch.manual_seed(0)
    attention = PETRMultiheadAttention(embed_dims=32, num_heads=2, dropout=0.0)
    layout = TokenLayout((6, 6), None)
    windows = Windows(layout, torch.randint(0, 6, (1, 8, 1, 2)), torch.ones(1, 8, 1, dtype=torch.bool), (3,))
    bias = LocalBias(windows, torch.full((1, 8, 2), 5.0)) if biased else None
    query, key = torch.randn(1, 8, 32), torch.randn(1, 36, 32)
    pairs = zip((query, key), attention.attn.in_proj_weight.chunk(3))
    q, k = (torch.nn.functional.linear(x, w).unflatten(-1, (2, 16)) for x, w in pairs)
    largest = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).abs().max().item()
    factor = (1e4 / largest) ** 0.5
    query, key = (query * factor).requires_grad_(), (key * factor).requires_grad_()
    with autocast("cpu", precision):
        out = attention(query, key, key, bias=bias)
    out.float().square().mean().backward()
    assert out.isfinite().all() and query.grad.isfinite().all() and key.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_queries_that_overflowed_give_finite_boxes_and_losses(model, frame):
    """A decoder whose fp16 output is infinite or NaN at some queries: they become numbers before the boxes."""
    head = model.pts_bbox_head
    decoded = torch.randn(2, 1, 300, 128).half()
    decoded[0, 0, 0], decoded[1, 0, 1] = float("inf"), float("nan")
    with torch.no_grad(), autocast("cpu", "fp16"):
        tasks = head.boxes(decoded, head.reference_points.weight[None])
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in tasks[0].values())
    codes = encode_boxes(frame["data_samples"][0].gt_instances_3d.bboxes_3d.tensor)
    assert codes.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision, dtype", HALF)
def test_islands_on_a_gpu(cuda, frame, precision, dtype):
    model = speed_model(load_config("cmt_aqr_tiny"), frame, cuda)
    with recorded_islands() as record, autocast("cuda", precision):
        values = model.train()(**model.data_preprocessor(copied(frame), True), mode="loss")
        sum(values.values()).backward()
    assert all(v.isfinite() for v in values.values())
    assert all((seen | made) <= {torch.float32, torch.float64} for calls in record.values() for seen, made in calls)
