"""Positional encodings against numbers of the released detector."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
from cmtaqr.detector.tokens import (  # noqa: E402
    bev_coords, camera_rays, clamp_anchors, depth_bins, inverse_sigmoid, query_rays, sine_embedding)

RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def near(got, want, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(want)), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def posenc(shared):
    return np.load(shared / "golden" / "posenc.npz")


@pytest.fixture(scope="module")
def projection(shared):
    return np.load(shared / "golden" / "projection.npz")


@pytest.fixture(scope="module")
def mlp(shared):
    """The two embedding MLPs with the golden weights, as functions of a vector."""
    state = np.load(shared / "golden" / "head_eval.npz")

    def make(name):
        w0, b0, w1, b1 = (torch.from_numpy(state[f"state/{name}.{key}"]) for key in ("0.weight", "0.bias", "2.weight", "2.bias"))
        return lambda x: F.linear(F.linear(x, w0, b0).relu(), w1, b1)
    return {name: make(name) for name in ("bev_embedding", "rv_embedding")}


def test_sinusoid(posenc):
    near(sine_embedding(torch.from_numpy(posenc["in/sine_pos"])), posenc["out/sine_256"])
    near(sine_embedding(torch.from_numpy(posenc["in/sine_pos"]), 128), posenc["out/sine_128"])
    near(sine_embedding(torch.from_numpy(posenc["in/sine_pos3"])), posenc["out/sine_pos3_256"])


def test_inverse_sigmoid(posenc):
    near(inverse_sigmoid(torch.from_numpy(posenc["in/inverse_sigmoid"])), posenc["out/inverse_sigmoid"])


def test_bev_tokens(posenc, mlp):
    coords = bev_coords((128, 128, 40))
    near(coords, posenc["out/bev_coords"])
    near(mlp["bev_embedding"](sine_embedding(coords)), posenc["out/bev_pos_embed"])


def test_bev_divisors_of_an_oblong_grid(projection):
    near(bev_coords(projection["in/grid_size"].tolist()), projection["out/coords_for_downsample8"])


def test_image_tokens(posenc, mlp):
    rays = camera_rays(posenc["in/lidar2img"], posenc["in/img_feat_hw"].tolist(), posenc["in/pad_shape"][:2].tolist(), RANGE)
    near(rays.flatten(0, 1)[:2], posenc["mid/rv_ray_coords_first_2_views"])
    near(mlp["rv_embedding"](rays.flatten(0, 1)), posenc["out/rv_pos_embed"])


def test_query_parts(posenc, mlp):
    anchors = clamp_anchors(torch.from_numpy(posenc["in/reference_points"]))
    near(mlp["bev_embedding"](sine_embedding(anchors)), posenc["out/bev_query_embed"])
    vectors, visible = query_rays(anchors, posenc["in/lidar2img"], posenc["in/pad_shape"][:2].tolist(), RANGE)
    part = (mlp["rv_embedding"](vectors) * visible[..., None]).sum(1)
    near(part, posenc["out/rv_query_embed"], atol=2e-5)


def test_projection(projection):
    depth_num = int(projection["in/depth_num"])
    near(depth_bins(projection["in/pc_range"].tolist(), depth_num), projection["out/depth_bins"])
    points = torch.from_numpy(projection["in/points_normalised"])
    pad, pc_range = projection["in/pad_shape"][:2].tolist(), projection["in/pc_range"].tolist()
    lidar2img = projection["in/lidar2img"]
    vectors, visible = query_rays(points.expand(len(lidar2img), -1, -1), lidar2img, pad, pc_range, depth_num)
    np.testing.assert_array_equal(visible.numpy(), projection["out/visible_mask"])
    points = vectors.unflatten(-1, (depth_num, 3))[..., ::8, :]
    near(points, projection["out/backprojected_normalised_every_8th_depth"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("matrices, message", [
    (np.zeros((1, 2, 4, 4)), "sample 0, view 0 has no inverse"), (np.eye(4), r"\[batch, views, 4, 4\]"),
    (np.full((1, 1, 4, 4), np.nan), "no inverse")])
def test_bad_matrices_are_named(matrices, message):
    with pytest.raises(ValueError, match=message):
        camera_rays(matrices, (2, 2), (32, 32), RANGE)
