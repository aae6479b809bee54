"""Voxels and the sparse encoder: a real frame, batches with empty clouds, bad input, the GPU."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
from cmtaqr.detector.sparse import LidarVoxelizer, sparse_backend, voxelize  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402

RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
SIZE = (0.1, 0.1, 0.2)


@pytest.fixture(scope="module")
def frame(shared):
    """Points of the real frame, [34688, 5]."""
    file = next((shared / "data" / "nuscenes_demo").glob("*LIDAR_TOP*.bin"))
    return torch.from_numpy(np.fromfile(file, np.float32).reshape(-1, 5))


@pytest.fixture
def voxelizer():
    return LidarVoxelizer(SIZE, (-12.8, -12.8, -5, 12.8, 12.8, 3), 10, (120000, 160000), (41, 240, 240))


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if sparse_backend() == "triton" else "cpu")


def make_encoder(sparse_shape):
    return MODELS.build(dict(
        type="SparseEncoder", in_channels=5, sparse_shape=list(sparse_shape), output_channels=128, order=("conv", "norm", "act"),
        encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, (0, 1, 1)), (0, 0)), block_type="basicblock"))


def test_real_frame_against_float64(frame):
    """Every voxel of the frame, from a float64 grouping that shares nothing with the implementation but the float32 cells."""
    features, cells = voxelize(frame, SIZE, RANGE, 10, 160000)
    # the float32 cell numbers: checked against float64 below, apart from points on a face
    number = np.floor((frame[:, :3].numpy() - np.float32(RANGE[:3])) / np.float32(SIZE))
    exact = np.floor((frame[:, :3].double().numpy() - RANGE[:3]) / SIZE)
    assert (number != exact).any(1).mean() < 1e-3
    inside = ((number >= 0) & (number < (1080, 1080, 40))).all(1)
    groups = {}
    for cell, point in zip(number[inside].astype(int), frame.double().numpy()[inside]):
        groups.setdefault(tuple(cell[::-1]), []).append(point)
    assert [tuple(c) for c in cells.tolist()] == list(groups)
    want = np.array([np.mean(points[:10], 0) for points in groups.values()])
    np.testing.assert_allclose(features.numpy(), want, rtol=1e-5, atol=1e-5)
    assert max(map(len, groups.values())) > 10, "the limit of points is not exercised"


@pytest.mark.parametrize("max_points, max_voxels", [(10, 160000), (10, 5000), (1, 3000)])
def test_real_frame_against_the_library(frame, max_points, max_voxels):
    package = "spconv" if sparse_backend() == "spconv" else "spconv_triton"
    utils = pytest.importorskip(f"{package}.pytorch.utils")
    voxels, indices, count = utils.PointToVoxel(list(SIZE), list(RANGE), 5, max_voxels, max_points, torch.device("cpu"))(frame)
    features, cells = voxelize(frame, SIZE, RANGE, max_points, max_voxels)
    assert torch.equal(cells, indices.long())
    torch.testing.assert_close(features, voxels.sum(1) / count[:, None])


def test_voxels_beyond_the_declared_shape_are_dropped(frame):
    voxelizer = LidarVoxelizer(SIZE, RANGE, 10, (120000, 160000), (41, 1024, 1024)).eval()
    everything = voxelize(frame, SIZE, RANGE, 10, 160000)[1]
    _, coords, _ = voxelizer([frame])
    assert len(coords) == (everything[:, 1:] < 1024).all(1).sum() < len(everything)
    assert coords[:, 2:].max() < 1024


def test_limits_follow_the_mode(voxelizer):
    voxelizer.max_voxels = (7, 11)
    points = torch.rand(500, 5, generator=torch.Generator().manual_seed(0)) * 8 - 4
    assert len(voxelizer.train()([points])[1]) == 7
    assert len(voxelizer.eval()([points])[1]) == 11


@pytest.mark.parametrize("counts", [(300, 0), (0, 300), (0, 300, 0), (0,), (0, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_empty_clouds(voxelizer, device, counts, training):
    """Any sample may be empty; the map of the others does not change, and a training step is finite."""
    torch.manual_seed(0)
    voxelizer.train(training)
    encoder = make_encoder(voxelizer.sparse_shape).to(device).train(training)
    clouds = [(torch.rand(n, 5) * 4 - 2).to(device) for n in counts]
    features, coords, batch_size = voxelizer(clouds)
    assert batch_size == len(counts) and sorted(set(coords[:, 0].tolist())) == list(range(batch_size))
    bev = encoder(features, coords, batch_size)
    assert bev.shape == (batch_size, 256, 30, 30) and bev.isfinite().all()
    if training:
        (bev * torch.randn_like(bev)).sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters())
    else:
        for sample, cloud in zip(bev, clouds):
            torch.testing.assert_close(sample, encoder(*voxelizer([cloud]))[0], rtol=1e-4, atol=1e-5)
        dropped = encoder(*voxelizer([clouds[0].new_zeros(10, 5)]))[0]
        for index, count in enumerate(counts):
            if not count:
                torch.testing.assert_close(bev[index], dropped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("points, message", [
    ([torch.full((3, 5), float("nan"))], "point cloud 0 .* NaN"), ([torch.rand(4, 5), torch.rand(4)], "point cloud 1 .* got"),
    ([], "no point cloud")])
def test_bad_clouds_are_named(voxelizer, points, message):
    with pytest.raises(ValueError, match=message):
        voxelizer(points)


def test_range_without_a_voxel():
    with pytest.raises(ValueError, match="holds no voxel"):
        LidarVoxelizer(SIZE, (0, 0, 0, 0.05, 1, 1), 10, 100, (1, 1, 1))


def _fresh(code, **env):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    return run.stdout + run.stderr


def test_missing_backend_says_what_to_install():
    hide = "import sys; sys.modules['spconv'] = sys.modules['spconv_triton'] = None\n"
    make = "from cmtaqr.detector.sparse import LidarVoxelizer; LidarVoxelizer((1, 1, 1), (0, 0, 0, 9, 9, 9), 1, 9, (9, 9, 9))"
    out = _fresh(hide + make)
    assert "ImportError" in out and "pip install spconv" in out and "spconv-triton" in out
    assert "expected 'spconv', 'triton' or 'auto'" in _fresh(make, CMTAQR_SPCONV="minkowski")


def test_convolutions_are_right_with_several_threads():
    """spconv's own CPU kernels lose additions with two threads; ours must be those of dense convolution each time."""
    out = _fresh("""
import torch, cmtaqr.detector
from cmtaqr.detector.sparse import sparse_backend
import spconv.pytorch as sp
device = "cuda" if sparse_backend() == "triton" else "cpu"
torch.manual_seed(0)
rows = torch.stack([torch.randint(n, (1500,)) for n in (2, 9, 16, 16)], 1).unique(dim=0).int()
tensor = sp.SparseConvTensor(torch.randn(len(rows), 32).to(device), rows.to(device), (9, 16, 16), 2)
occupied = torch.zeros(2, 9, 16, 16)
occupied[tuple(rows.long().T)] = 1
occupied = occupied[:, None]
conv, strided = sp.SubMConv3d(32, 32, 3, bias=False).to(device), sp.SparseConv3d(32, 32, 3, 2, 1, bias=False).to(device)
with torch.no_grad():
    dense = tensor.dense().cpu()
    want = torch.nn.functional.conv3d(dense, conv.weight.cpu().permute(0, 4, 1, 2, 3), padding=1) * occupied
    want2 = torch.nn.functional.conv3d(dense, strided.weight.cpu().permute(0, 4, 1, 2, 3), padding=1, stride=2)
    errors = [float((m(tensor).dense().cpu() - w).abs().max()) for _ in range(6) for m, w in ((conv, want), (strided, want2))]
print("largest error", max(errors))
""", OMP_NUM_THREADS="2")
    assert float(out.split("largest error")[-1].split()[0]) < (5e-3 if sparse_backend() == "triton" else 1e-4), out


def test_names_of_the_encoder(shared):
    entries = json.loads((shared / "golden" / "keys_r50.json").read_text())["entries"]
    prefix = "pts_middle_encoder."
    want = {k[len(prefix):]: list(v[0]) for k, v in entries.items() if k.startswith(prefix)}
    assert {k: list(v.shape) for k, v in make_encoder((41, 1024, 1024)).state_dict().items()} == want


def test_voxels_are_the_same_on_the_gpu(cuda):
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(250000, 5, generator=generator) * 2 - 1) * torch.tensor([60.0, 60, 4, 255, 1])
    points[:100000, :3] *= 0.1
    here, there = voxelize(points, SIZE, RANGE, 10, 120000), voxelize(points.to(cuda), SIZE, RANGE, 10, 120000)
    again = voxelize(points.to(cuda), SIZE, RANGE, 10, 120000)
    assert torch.equal(there[0], again[0]) and torch.equal(there[1], again[1])
    assert torch.equal(here[1], there[1].cpu())
    torch.testing.assert_close(here[0], there[0].cpu(), rtol=1e-5, atol=1e-5)


def test_full_size_training_step_on_the_gpu(cuda):
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([54.0, 54, 2, 1, 1])
    clouds = [((torch.rand(250000, 5, generator=generator) * 2 - 1) * extent).to(cuda) for _ in range(2)]
    voxelizer = LidarVoxelizer(SIZE, RANGE, 10, (120000, 160000), (41, 1024, 1024)).train()
    encoder = make_encoder(voxelizer.sparse_shape).to(cuda).train()
    bev = encoder(*voxelizer(clouds))
    assert bev.shape == (2, 256, 128, 128) and bev.is_cuda
    bev.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
