"""Box codes, matching, losses and denoising against the golden files."""
import json

import numpy as np
import pytest
import torch

from cmtaqr.detector.denoising import make_denoising
from cmtaqr.detector.losses import (LossSettings, box_cost, decode_boxes, encode_boxes, focal_cost, match, set_loss)

RANGE = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]


def load(shared, name):
    """Golden file as tensors; strings are parsed as JSON."""
    with np.load(shared / "golden" / name) as data:
        return {k: json.loads(str(data[k])) if k.endswith("json") else torch.from_numpy(data[k]) for k in data.files}


def close(actual, expected, tolerance=1e-5):
    """Largest error at most `tolerance` of the largest magnitude."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * max(expected.abs().max().item(), 1e-12)


def gravity(boxes):
    """Bottom centres to gravity centres."""
    boxes = boxes.clone()
    boxes[:, 2] += boxes[:, 5] / 2
    return boxes


def codes_of(predictions):
    """The head's branches side by side, in the order of the box code."""
    return torch.cat([predictions[k] for k in ("center", "height", "dim", "rot", "vel")], -1)


def test_box_code(shared):
    golden = load(shared, "normalize_bbox.npz")
    close(encode_boxes(golden["in/boxes9_gravity_center"]), golden["out/encoded10"])
    close(decode_boxes(golden["out/encoded10"]), golden["out/decoded9"])
    close(encode_boxes(golden["in/boxes7"]), golden["out/encoded8"])


@pytest.mark.parametrize("case", range(4))
def test_matching(shared, case):
    golden = load(shared, "assigner_cost.npz")
    codes, logits = golden[f"in/{case}/pred10"], golden[f"in/{case}/logits"]
    gt, labels = encode_boxes(golden[f"in/{case}/gt_boxes9_gravity_center"]), golden[f"in/{case}/gt_labels"]
    if len(gt):
        cls, reg = 2 * focal_cost(logits, labels), 0.25 * box_cost(codes, gt, LossSettings().code_weights)
        close(cls, golden[f"out/{case}/cls_cost"])
        close(reg, golden[f"out/{case}/reg_cost"])
        close(cls + reg, golden[f"out/{case}/cost"])
    assigned = match(logits, codes, labels, gt)
    assert torch.equal(assigned + 1, golden[f"out/{case}/assigned_gt_inds"])
    expected = torch.full_like(assigned, -1)
    expected[assigned >= 0] = labels[assigned[assigned >= 0]]
    assert torch.equal(expected, golden[f"out/{case}/assigned_labels"])


def test_set_loss(shared):
    golden = load(shared, "loss.npz")
    predictions = {k.split("/")[-1]: v for k, v in golden.items() if k.startswith("in/pred/")}
    codes = codes_of(predictions)
    gt = [encode_boxes(gravity(golden[f"in/{b}/gt_boxes9_bottom_center"])) for b in range(2)]
    labels = [golden[f"in/{b}/gt_labels"] for b in range(2)]
    for layer in range(2):
        cls, box, assigned = set_loss(predictions["cls_logits"][layer], codes[layer], labels, gt)
        close(cls, golden[f"out/layer{layer}/loss_cls"])
        close(box, golden[f"out/layer{layer}/loss_bbox"])
        target = torch.stack([torch.where(a >= 0, l[a.clamp(min=0)], 10) for a, l in zip(assigned, labels)])
        assert torch.equal(target, golden[f"out/layer{layer}/target_labels"])
        assert (assigned >= 0).sum() == golden[f"out/layer{layer}/num_pos"]
        assert (assigned < 0).sum() == golden[f"out/layer{layer}/num_neg"]
    cls, box, _ = set_loss(predictions["cls_logits"][0], codes[0], [labels[0][:0]] * 2, [gt[0][:0]] * 2)
    close(cls, golden["out/no_gt/loss_cls"])
    close(box, golden["out/no_gt/loss_bbox"])


def test_denoising(shared):
    golden = load(shared, "dn_train.npz")
    boxes = [gravity(golden[f"in/{b}/gt_boxes9_bottom_center"]) for b in range(2)]
    labels = [golden[f"in/{b}/gt_labels"] for b in range(2)]
    dn = make_denoising(boxes, labels, 60, 10, RANGE, noise=golden["in/uniform_noise_0_1"] * 2 - 1)
    assert dn.groups == golden["mid/groups"] and dn.num_slots == golden["mid/pad_size"]
    close(dn.anchors, golden["mid/padded_reference_points"][:, : dn.num_slots], 1e-6)
    assert torch.equal(dn.mask, golden["mid/self_attn_mask_true_is_blocked"])
    assert torch.equal(dn.labels, golden["mid/known_labels_noised"])
    assert torch.equal(dn.raw_labels, golden["mid/known_labels_raw"])
    assert torch.equal(dn.slot, golden["mid/map_known_indice"]) and torch.equal(dn.sample, golden["mid/batch_of_known"])
    close(dn.boxes, golden["mid/known_boxes9_gravity_center"])
