"""Box codes, matching, losses and denoising against the golden files."""
import json
import warnings

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
    assigned, = match(logits[None], codes[None], [labels], [gt])
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


def test_targets_are_pairs():
    """Objects of some samples only, of none, and more objects than queries, in several layers at once."""
    torch.manual_seed(0)
    gt, labels = torch.randn(3, 10), torch.tensor([2, 0, 1])
    codes, logits = torch.randn(2, 2, 2, 10), torch.randn(2, 2, 2, 4)
    for count, positives in (((3, 1), 3), ((0, 3), 2), ((0, 0), 0)):
        cls, box, assigned = set_loss(logits, codes, [labels[:n] for n in count], [gt[:n] for n in count])
        assert cls.shape == box.shape == (2,) and assigned.shape == (2, 2, 2)
        for layer in range(2):
            pairs = [(b, q, g) for b in range(2) for q, g in enumerate(assigned[layer, b].tolist()) if g >= 0]
            assert len(pairs) == positives
            weights = torch.tensor(LossSettings().code_weights)
            total = sum(((codes[layer, b, q] - gt[g]).abs() * weights).sum() for b, q, g in pairs)
            close(box[layer], torch.as_tensor(0.25 * total / max(positives, 1)))


@pytest.mark.gpu
def test_waits(cuda):
    """The losses of all layers and samples wait for the GPU twice: costs to the host, pairs back."""
    codes, logits = torch.randn(6, 4, 900, 10, device=cuda), torch.randn(6, 4, 900, 10, device=cuda)
    gt, labels = [torch.randn(n, 10, device=cuda) for n in (40, 0, 7, 1)], [torch.arange(n, device=cuda) % 10 for n in (40, 0, 7, 1)]
    expected = set_loss(logits.cpu(), codes.cpu(), [x.cpu() for x in labels], [x.cpu() for x in gt])
    set_loss(logits, codes, labels, gt)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = set_loss(logits, codes, labels, gt)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in seen) == 2
    for x, y in zip(found, expected):
        close(x.cpu(), y)


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
