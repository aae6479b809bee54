"""The router where a sensor is not there: layouts without a map, frames whose sensor was masked, and supervision on those."""
import numpy as np
import pytest
import torch

from cmtaqr.geometry import TokenLayout, Windows
from cmtaqr.router import AQRWeightGenerator, dropped_sensor_loss
from test_modulation import batch, tiny, windows_on

LIDAR, CAMERA = TokenLayout((7, 9), None), TokenLayout(None, (3, 4, 6))


@pytest.mark.parametrize("layout, there", [(LIDAR, 0), (CAMERA, 1)], ids=["LiDAR", "cameras"])
def test_a_sensor_without_a_map_has_weight_zero(layout, there):
    torch.manual_seed(0)
    windows, memory = windows_on(layout), torch.randn(2, layout.num_keys, 16)
    router = AQRWeightGenerator(16, 4, 32, window_sizes=[4, 3])
    torch.nn.init.normal_(router.to_weights.weight)
    torch.nn.init.constant_(router.to_weights.bias, 0.5)
    weights = router(torch.randn(2, 14, 16), memory, memory, windows)
    assert not weights[..., 1 - there].any() and weights[..., there].all() and weights.isfinite().all()
    weights.sum().backward()
    grad = router.to_weights.bias.grad
    assert grad[there] != 0 and grad[1 - there] == 0


@pytest.mark.parametrize("margin", [0.3, 1.5])
def test_supervision_equals_the_loop(margin):
    windows = windows_on(TokenLayout((7, 9), (2, 4, 6)), batch=4)
    dropped = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    weights = (2 * torch.rand(4, 14, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1).requires_grad_()
    terms = []
    for b, q in np.ndindex(4, 14):
        if windows.seen[b, q, 0] and windows.seen[b, q, 1:].any() and b < 2:
            lidar, camera = weights[b, q]
            terms.append((margin - (camera - lidar if b == 0 else lidar - camera)).clamp(min=0) ** 2)
    loss, expected = dropped_sensor_loss(weights, windows, dropped, margin), torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = (torch.autograd.grad(x, weights)[0] for x in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    for part in (LIDAR, CAMERA):
        alone = dropped_sensor_loss(weights, windows_on(part, batch=4), dropped, margin)
        assert alone == 0 and not torch.autograd.grad(alone, weights)[0].any()


def masked_batch():
    """The first frame without images, the second without points, as `ModalityMask` and the preprocessor leave them."""
    inputs, samples = batch()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395]))
    inputs["imgs"][0] = -mean / std
    inputs["points"][1] = torch.zeros_like(inputs["points"][1])
    for sample, left in zip(samples, ("lidar", "camera")):
        sample.set_metainfo(dict(modality=left))
    return inputs, samples


def test_the_mask_says_which_sensor_is_left():
    """`ModalityMask` writes the names that the loss reads, and they reach the model."""
    pytest.importorskip("mmdet3d")
    from cmtaqr.data.pipelines import COMMON_KEYS
    from cmtaqr.data.transforms import ModalityMask
    from mmdet3d.structures import LiDARPoints

    assert "modality" in COMMON_KEYS
    for image, lidar, left in ((1.0, 0.0, "lidar"), (0.0, 1.0, "camera"), (0.0, 0.0, "both")):
        frame = dict(img=[np.ones((2, 2, 3))], points=LiDARPoints(torch.ones(3, 5), points_dim=5))
        frame = ModalityMask(image, lidar).transform(frame)
        assert frame["modality"] == left
        assert (frame["img"][0].any(), bool(frame["points"].tensor.any())) == (left != "lidar", left != "camera")


@pytest.mark.parametrize("version", [1, 3])
def test_masked_frames_have_defined_weights_and_supervise_where_asked(version):
    model = tiny(version, auxiliary=dict(weight=2.0, margin=0.5)).train()
    head, caught = model.pts_bbox_head, {}
    head.register_forward_hook(lambda m, args, out: caught.update(out["aqr"]))
    head.aqr_router.register_forward_pre_hook(lambda m, args: caught.update(inputs=args))
    losses = model.loss(*masked_batch())
    assert losses["loss_aqr"].item() == pytest.approx(2 * 0.5 ** 2), "all weights are 0 at first"
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    *tokens, windows = (x if isinstance(x, Windows) else x.detach() for x in caught["inputs"])
    router, dropped = head.aqr_router, torch.tensor([[False, True], [True, False]])
    optimiser = torch.optim.Adam(router.parameters(), 1e-3)
    for _ in range(40):
        loss = dropped_sensor_loss(router(*tokens, windows), windows, dropped, 0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        weights = router(*tokens, windows)
    has_both = windows.seen[..., 0] & windows.seen[..., 1:].any(-1)
    gap = weights[..., 0] - weights[..., 1]
    assert weights.isfinite().all() and loss < 0.02
    assert (gap[0][has_both[0]] > 0).all() and (gap[1][has_both[1]] < 0).all(), "less trust in what is gone"


def test_frames_without_a_mask_do_not_supervise():
    model = tiny(3, auxiliary=dict())
    inputs, samples = batch()
    losses = model.train().loss(inputs, samples)
    assert losses["loss_aqr"] == 0 and losses["loss_aqr"].requires_grad
