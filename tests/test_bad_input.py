"""Batches that do not fit, one by one: defined, or refused with a message, by the small detector of the synthetic world."""
import copy

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")

from mmengine.structures import InstanceData  # noqa: E402

import cmtaqr.detector  # noqa: E402, F401
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes  # noqa: E402

from test_detector import batch, build, cloud, finite_step, model_config, sample  # noqa: E402

CLASSES = 10


@pytest.fixture(scope="module")
def tiny():
    return build(model_config())


@pytest.fixture(scope="module")
def still():
    """A model that no test trains: its batch norms keep their first statistics."""
    return build(model_config()).eval()


@pytest.fixture(scope="module")
def few():
    """A model with fewer queries than the frames below have objects, as 900 queries meet more than 900 boxes."""
    cfg = model_config()
    cfg.pts_bbox_head.update(num_query=12, denoising=dict(groups=10, noise_scale=1.0))
    return build(cfg)


def both(model, inputs, samples, message):
    """Training and inference refuse the batch with the message."""
    for call in (lambda: model.train().loss(inputs, samples), lambda: model.eval().predict(inputs, samples)):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            call()


def predict(model, inputs, samples):
    with torch.no_grad():
        return [s.pred_instances_3d for s in model.eval().predict(inputs, samples)]


def finite(results):
    for found in results:
        assert found.bboxes_3d.tensor.isfinite().all() and found.scores_3d.isfinite().all() and found.aqr_weights.isfinite().all()


@pytest.mark.parametrize("views", [5, 7, 1])
def test_another_number_of_images_than_matrices(tiny, views):
    inputs, samples = batch()
    inputs["imgs"] = torch.randn(2, views, 3, 128, 320)
    both(tiny, inputs, samples, f"sample 0 has {views} images and 6 matrices")


def test_as_many_images_in_all_but_not_per_sample(tiny):
    """Two samples with 6 views are 12 images, as three with 4 are: the flattened batch alone does not show it."""
    inputs, samples = batch()
    inputs["imgs"] = torch.randn(3, 4, 3, 128, 320)
    both(tiny, inputs, samples, "3 sets of images and 2 samples")


def test_a_sample_with_fewer_cameras_than_its_neighbour(tiny):
    inputs, samples = batch()
    samples[1].set_metainfo(dict(lidar2img=samples[1].lidar2img[:5], token="f2"))
    both(tiny, inputs, samples, "sample f2 has 6 images and 5 matrices")
    images = [torch.zeros(views, 3, 128, 320) for views in (6, 5)]
    raw = dict(inputs=dict(points=inputs["points"], img=images), data_samples=samples)
    with pytest.raises(ValueError, match="have 6, 5 images"):
        tiny.test_step(raw)


def test_another_rig_is_defined(tiny):
    """The number of cameras is the data's: four views with their four matrices work."""
    inputs, samples = batch()
    inputs["imgs"] = inputs["imgs"][:, :4]
    for s in samples:
        s.set_metainfo(dict(lidar2img=s.lidar2img[:4]))
    finite_step(tiny.train(), inputs, samples)
    finite(predict(tiny, inputs, samples))


def test_images_of_unequal_size_within_a_sample(tiny):
    _, samples = batch()
    views = [torch.zeros(3, 128, 320)] * 5 + [torch.zeros(3, 96, 320)]
    for step in (lambda data: tiny.test_step(data), lambda data: tiny.data_preprocessor(data, True)):
        with pytest.raises(ValueError, match=r"images of sample 0 differ in size .*\(3, 96, 320\)"):
            step(dict(inputs=dict(points=[cloud(10)], img=[views]), data_samples=samples[:1]))


def test_images_of_unequal_size_within_a_batch_are_padded(tiny):
    """A smaller neighbour is padded at the right and below: the larger sample's result is what it is alone."""
    _, samples = batch(size=(128, 320))
    torch.manual_seed(0)
    large, small = (torch.randint(0, 255, (6, 3, *size)).float() for size in ((128, 320), (64, 256)))
    clouds = [cloud(2000), cloud(1500, 1)]
    data = tiny.data_preprocessor(dict(inputs=dict(points=clouds, img=[large, small]), data_samples=copy.deepcopy(samples)),
                                  False)
    padded = data["inputs"]["imgs"][1]
    assert padded.shape == (6, 3, 128, 320) and not padded[..., 64:, :].any() and not padded[..., 256:].any()
    finite_step(tiny.train(), data["inputs"], data["data_samples"])
    with torch.no_grad():
        tiny.eval()
        together = tiny.test_step(dict(inputs=dict(points=clouds, img=[large, small]), data_samples=copy.deepcopy(samples)))
        alone = tiny.test_step(dict(inputs=dict(points=clouds[:1], img=[large]), data_samples=copy.deepcopy(samples[:1])))
    finite([s.pred_instances_3d for s in together])
    torch.testing.assert_close(together[0].pred_instances_3d.scores_3d, alone[0].pred_instances_3d.scores_3d, atol=1e-5,
                               rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda m: None, "sample f7: no lidar2img.*calibration is missing"),
    (lambda m: m[:, :3], r"must be \[views, 4, 4\]"),
    (lambda m: m * np.array([1.0, 0, 1, 1])[:, None], "sample f7: lidar2img of camera A has no inverse"),
    (lambda m: np.concatenate([m[:, :2], m[:, 1:2] / 3 * 3, m[:, 3:]], 1), "sample f7: lidar2img of camera A has no inverse"),
    (lambda m: np.where(np.arange(6)[:, None, None] == 2, np.nan, m), "sample f7: lidar2img of camera C contains NaN"),
    (lambda m: np.where(np.arange(6)[:, None, None] == 5, np.inf, m),
     "sample f7: lidar2img of camera F contains NaN or infinity"),
], ids=["missing", "3 rows", "zero row", "equal rows", "NaN", "infinity"])
def test_broken_calibration(tiny, change, message):
    inputs, samples = batch()
    broken = change(samples[1].lidar2img)
    samples[1].set_metainfo(dict(lidar2img=broken, token="f7", cameras=list("ABCDEF")))
    if broken is None:
        del samples[1].lidar2img
        samples[1]._metainfo_fields.discard("lidar2img")
    both(tiny, inputs, samples, message)


def test_calibration_is_not_needed_without_images(tiny):
    inputs, samples = batch()
    for s in samples:
        s.set_metainfo(dict(lidar2img=np.full((6, 4, 4), np.nan)))
    finite(predict(tiny, dict(inputs, imgs=None), samples))


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("how", ["no points", "out of range"])
def test_clouds_without_a_voxel_anywhere_in_the_batch(still, tiny, empty, how):
    """First, middle, last or all: the batch stays three samples, and every map belongs to its own cloud."""
    far = torch.tensor([[500.0, 500, 0, 1, 0]]) if how == "out of range" else torch.zeros(0, 5)
    inputs, samples = batch(points=(1500, 1200, 1000), boxes=(2, 3, 1))
    with torch.no_grad():
        whole = still.extract_feat(inputs, samples)[0]
        inputs["points"] = [far if i in empty else p for i, p in enumerate(inputs["points"])]
        maps = still.extract_feat(inputs, samples)[0]
    results = predict(still, inputs, samples)
    assert len(maps) == len(results) == 3
    finite(results)
    spread = whole.std()
    for i in range(3):
        difference = (maps[i] - whole[i]).abs().max() / spread
        assert difference > 0.1 if i in empty else difference < 1e-4, i
    if how == "no points":
        finite_step(tiny.train(), inputs, samples)


@pytest.mark.parametrize("columns", [3, 4, 6])
def test_points_with_another_number_of_columns(tiny, columns):
    inputs, samples = batch()
    inputs["points"][1] = torch.zeros(100, columns)
    both(tiny, inputs, samples, rf"point cloud 1 of the batch is \(100, {columns}\), the model needs \[N, 5\]")


@pytest.mark.parametrize("points", [1, 3])
def test_another_number_of_clouds_than_samples(tiny, points):
    inputs, samples = batch()
    inputs["points"] = [cloud(100)] * points
    both(tiny, inputs, samples, f"{points} point clouds and 2 samples")


@pytest.mark.parametrize("boxes", [(13, 0), (0, 40), (12, 5), (0, 0), (120, 130)])
def test_no_boxes_or_more_boxes_than_queries(few, boxes):
    """Upstream divides by zero, or has no denoising group; here one group remains, and every query has an object at most."""
    inputs, samples = batch(boxes=boxes)
    losses = finite_step(few.train(), inputs, samples)
    assert (losses["dn_loss_bbox"] > 0) == any(boxes) and (losses["loss_bbox"] > 0) == any(boxes)
    if not any(boxes):
        assert losses["loss_cls"] > 0
    from cmtaqr.detector.branches import ground_truth
    from cmtaqr.detector.denoising import make_denoising
    dn = make_denoising(*ground_truth(samples, "cpu", CLASSES), 12, CLASSES, few.pts_bbox_head.point_cloud_range)
    most = max(boxes)
    assert (dn is None) == (most == 0)
    if most:
        assert dn.groups == max(1, 12 // most) and dn.anchors.shape == (2, dn.groups * most, 3)


def test_more_than_900_boxes(tiny):
    """The tiny model has 300 queries: a frame of 950 boxes has one denoising group of 950."""
    finite_step(tiny.train(), *batch(boxes=(950, 2)))


def labelled(labels):
    """A batch of one sample whose boxes have these labels."""
    inputs, samples = batch(points=(1500,), boxes=(len(labels),))
    samples[0].gt_instances_3d.labels_3d = torch.tensor(labels)
    return inputs, samples


def seeded_losses(model, inputs, samples):
    torch.manual_seed(5)
    return finite_step(model.train(), inputs, samples)


def test_objects_of_no_class_are_as_if_absent(tiny):
    inputs, samples = labelled([3, -1, 0, -1])
    kept = Det3DDataSample(metainfo=samples[0].metainfo, gt_instances_3d=InstanceData(
        bboxes_3d=samples[0].gt_instances_3d.bboxes_3d[[0, 2]], labels_3d=torch.tensor([3, 0])))
    with_them, without = seeded_losses(tiny, inputs, samples), seeded_losses(tiny, inputs, [kept])
    assert all(torch.equal(with_them[k], without[k]) for k in without)
    losses = seeded_losses(tiny, *labelled([-1, -1]))
    assert losses["loss_bbox"] == 0 and losses["dn_loss_bbox"] == 0


@pytest.mark.parametrize("label", [10, 99])
def test_labels_beyond_the_list_are_refused(tiny, label):
    inputs, samples = labelled([3, label])
    with pytest.raises(ValueError, match=f"label {label}, the model has 10 classes .*same class names"):
        tiny.train().loss(inputs, samples)


def test_boxes_without_velocity_are_refused(tiny):
    inputs, samples = batch()
    samples[0].gt_instances_3d.bboxes_3d = LiDARInstance3DBoxes(torch.ones(5, 7), box_dim=7)
    with pytest.raises(ValueError, match="boxes need 9 numbers"):
        tiny.train().loss(inputs, samples)


def test_boxes_with_nan_do_not_reach_the_weights(tiny):
    inputs, samples = batch()
    samples[0].gt_instances_3d.bboxes_3d.tensor[1, 7:] = float("nan")
    finite_step(tiny.train(), inputs, samples)


def test_nan_in_points_is_refused(tiny):
    inputs, samples = batch()
    inputs["points"][1][3, 2] = float("nan")
    both(tiny, inputs, samples, "point cloud 1 of the batch contains NaN")


def test_no_sensor(tiny):
    both(tiny, dict(points=None, imgs=None), [sample(1)], "no sensor left")
