"""One real nuScenes key frame through the same pipeline as everything else; skips where the frame is absent.

The frame's info file holds 84 2D boxes (`cam_instances`) that were made without our projection, and the number of LiDAR points
per 3D box. Both are independent witnesses of the matrices.
"""
import resource

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from cmtaqr.data.frames import NuScenesFrames  # noqa: E402
from cmtaqr.data.pipelines import nuscenes_pipeline  # noqa: E402

# isort: split
from mmdet3d.structures.ops import points_in_rbbox  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

CLASSES = ["car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
           "traffic_cone"]
WIDE = [-200.0, -200.0, -20.0, 200.0, 200.0, 20.0]  # metres; keeps every box of the frame in the training form
GEOMETRY = dict(resize=(0.94, 1.25), flip_image=0.5, rotation=(-0.785, 0.785), scale=(0.9, 1.1), translation=0.5, flip_scene=0.5)


class AllBoxes(NuScenesFrames):
    """Training ignores boxes without LiDAR points; three of the frame's 2D boxes belong to such boxes, so they are kept here."""

    def _filter_with_mask(self, ann_info):
        return ann_info


@pytest.fixture(scope="module")
def info_file(shared):
    files = sorted((shared / "data/nuscenes_demo").glob("*.pkl"))
    if not files:
        pytest.skip(f"the real frame is not in {shared / 'data/nuscenes_demo'}")
    init_default_scope("mmdet3d")
    return files[0]


def load(info_file, training, seed=0, augmentation=None):
    """The frame's raw record and the packed sample; 3D boxes and points of the sample in its own (augmented) coordinates."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    pipeline = nuscenes_pipeline(training, WIDE, CLASSES, (320, 800), augmentation=augmentation)
    dataset = AllBoxes(info_file.parent, info_file.name, data_prefix=dict(pts="", sweeps="", img=""), pipeline=pipeline,
                       test_mode=not training, metainfo=dict(classes=CLASSES))
    sample = dataset[0]
    data = sample["data_samples"]
    if training:
        boxes, labels = data.gt_instances_3d.bboxes_3d, data.gt_instances_3d.labels_3d.numpy()
    else:
        boxes, labels = data.eval_ann_info["gt_bboxes_3d"], data.eval_ann_info["gt_labels_3d"]
    known = labels >= 0  # one instance belongs to none of the ten classes
    return dataset.get_data_info(0), sample, boxes[torch.from_numpy(known)], labels[known], dataset.label_mapping


def rectangle(points):
    return np.concatenate([points.min(0), points.max(0)])


def best_ious(raw, sample, boxes, labels, label_mapping):
    """For each 2D box of the frame the IoU with the best projected 3D box of its class, in pixels of the network input."""
    meta = sample["data_samples"].metainfo
    ious = []
    for view, camera in enumerate(meta["cameras"]):
        affine, (height, width) = meta["img_affine"][view], meta["ori_shape"][view]
        to_input = lambda xy: xy @ affine[:2, :2].T + affine[:2, 2]  # noqa: E731
        frame = rectangle(to_input(np.array([[0, 0], [width, height]], float)))  # the 2D boxes are clipped to the original image
        projected = []
        for corners, label in zip(boxes.corners.numpy().astype(float), labels):
            p = np.c_[corners, np.ones(8)] @ meta["lidar2img"][view].T
            if (p[:, 2] > 0.1).any():
                p = p[p[:, 2] > 0.1]
                box = rectangle(p[:, :2] / p[:, 2:3])
                box = np.array([*np.maximum(box[:2], frame[:2]), *np.minimum(box[2:], frame[2:])])
                if (box[2:] > box[:2]).all():
                    projected.append((label, box))
        for instance in raw["cam_instances"][camera]:
            box = rectangle(to_input(np.array(instance["bbox"]).reshape(2, 2)))
            wanted = label_mapping[instance["bbox_label_3d"]]
            ious.append(max((iou(box, other) for label, other in projected if label == wanted), default=0.0))
    return np.array(ious)


def iou(a, b):
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap)


FORMS = [("test", False, 0, None)] + [(f"augmented-{seed}", True, seed, GEOMETRY) for seed in range(4)]


@pytest.mark.parametrize("name,training,seed,augmentation", FORMS, ids=[form[0] for form in FORMS])
def test_own_2d_boxes_find_their_3d_boxes(info_file, record_property, name, training, seed, augmentation):
    loaded = load(info_file, training, seed, augmentation)
    ious = best_ious(*loaded)
    print(f"{name}: {len(ious)} boxes, IoU median {np.median(ious):.3f}, minimum {ious.min():.3f}")
    assert len(ious) == 84
    assert np.median(ious) >= 0.93
    assert ious.min() >= 0.80


@pytest.mark.parametrize("name,training,seed,augmentation", FORMS, ids=[form[0] for form in FORMS])
def test_points_in_boxes_agree_with_the_annotation(info_file, name, training, seed, augmentation):
    raw, sample, boxes, labels, _ = load(info_file, training, seed, augmentation)
    told = np.array([instance["num_lidar_pts"] for instance in raw["instances"] if instance["bbox_label_3d"] >= 0])
    counted = points_in_rbbox(sample["inputs"]["points"].numpy(), boxes.tensor.numpy()).sum(0)
    equal, correlation = np.mean(told == counted), np.corrcoef(told, counted)[0, 1]
    print(f"{name}: {len(told)} boxes, equal for {equal:.1%}, correlation {correlation:.5f}")
    assert len(boxes) == len(told)
    assert equal > 0.8 and correlation > 0.9995


def test_the_witness_is_sensitive(info_file):
    """A matrix that forgets one augmentation must be caught by the 2D boxes."""
    raw, sample, boxes, labels, mapping = load(info_file, True, 0, dict(rotation=(0.1, 0.1)))
    meta = sample["data_samples"].metainfo
    assert np.median(best_ious(raw, sample, boxes, labels, mapping)) >= 0.93
    sample["data_samples"].set_metainfo(dict(lidar2img=meta["lidar2img"] @ meta["lidar_aug_matrix"]))
    assert np.median(best_ious(raw, sample, boxes, labels, mapping)) < 0.3


def test_r50_aqr_trains_on_the_frame(info_file, record_property):
    """The full-size configuration: forward, losses, backward; a gradient for every trained tensor."""
    from cmtaqr.engine.configure import load_config
    from mmdet3d.registry import MODELS
    from mmengine.dataset import pseudo_collate

    cfg = load_config("cmt_aqr_voxel0100_r50_800x320_cbgs")
    torch.manual_seed(0)
    pipeline = nuscenes_pipeline(True, cfg.point_cloud_range, cfg.class_names, cfg.input_size)
    dataset = NuScenesFrames(info_file.parent, info_file.name, data_prefix=dict(pts="", sweeps="", img=""), pipeline=pipeline,
                             metainfo=dict(classes=cfg.class_names))
    model = MODELS.build(cfg.model).train()
    batch = model.data_preprocessor(pseudo_collate([dataset[0]]), True)
    assert batch["inputs"]["imgs"].shape == (1, 6, 3, 320, 800)
    terms = model(**batch, mode="loss")
    # classification, boxes and both of the denoising queries, at six decoder layers
    assert len([name for name in terms if "loss" in name]) == 24
    assert all(np.isfinite(value.item()) and value.item() > 0 for value in terms.values())
    sum(value for name, value in terms.items() if "loss" in name).backward()
    # The router's last layer starts at zero: nothing behind it, and not the scale, has a gradient in the first step. Queries
    # start without content, so the first self-attention has nothing to weigh yet.
    silent = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    first = "pts_bbox_head.transformer.decoder.layers.0."
    quiet = "attentions.0.attn.out_proj.weight", "norms.0.weight", "attentions.0.attn.in_proj_weight"
    expected = {first + name for name in quiet}
    assert {name for name in silent if not name.startswith("pts_bbox_head.aqr_")} == expected
    assert model.pts_bbox_head.aqr_router.to_weights.weight.grad.abs().max() > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    record_property("peak_rss_gib", peak)
    assert peak < 12
