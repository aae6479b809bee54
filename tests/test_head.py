"""The head in its three forms against the golden files, and AQR as an addition that starts from nothing."""
import functools

import pytest
import torch

from test_losses import close, codes_of, gravity, load

pytest.importorskip("mmdet3d")

from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import cmtaqr.detector.head as head_module  # noqa: E402
from cmtaqr.detector.branches import GroupLayerNorm1d, SeparateTaskHead, decode_predictions  # noqa: E402
from cmtaqr.detector.golden import build_head  # noqa: E402
from cmtaqr.detector.losses import encode_boxes  # noqa: E402

BRANCHES = ("center", "height", "dim", "rot", "vel", "cls_logits")
AQR = dict(router=dict(type="AQRWeightGenerator", window_sizes=[4, 5]),
           bias=dict(type="AttentionBiasGenerator", window_size=[3, 5]))


@pytest.fixture(scope="module")
def golden(shared):
    return load(shared, "head_eval.npz")


def state_of(golden):
    return {k[len("state/"):]: v for k, v in golden.items() if k.startswith("state/")}


def inputs_of(golden):
    metas = [dict(lidar2img=m.numpy(), pad_shape=golden["in/pad_shape"].tolist()) for m in golden["in/lidar2img"]]
    return golden["in/pts_feat"], golden["in/img_feat"], metas


def compare(outputs, golden, prefix):
    for name in BRANCHES:
        close(outputs[name], golden[f"{prefix}{name}"])


def test_fusion_head(golden):
    head = build_head(golden["config_json"]).eval()
    head.load_state_dict(state_of(golden))
    seen = {}
    head.shared_conv.register_forward_hook(lambda m, args, out: seen.update(conv=out))
    head.transformer.register_forward_hook(lambda m, args, out: seen.update(decoder=out, query=args[2]))
    with torch.no_grad():
        out = head(*inputs_of(golden))
    compare(out["tasks"][0], golden, "out/")
    close(seen["conv"], golden["mid/shared_conv"])
    close(seen["decoder"], golden["mid/decoder"])
    close(seen["query"], golden["mid/query_embed"])
    assert out["aqr"] is None and out["dn"] is None


def test_single_modality_heads(shared, golden):
    single, state = load(shared, "head_eval_single_modality.npz"), state_of(golden)
    pts, img, metas = inputs_of(golden)
    camera = build_head(golden["config_json"], in_channels=None).eval()
    camera.load_state_dict({k: v for k, v in state.items() if not k.startswith("shared_conv.")})
    lidar = build_head(golden["config_json"], use_camera=False, final_kernel=3).eval()
    own = {k[len("state_lidar/"):]: v for k, v in single.items() if k.startswith("state_lidar/")}
    lidar.load_state_dict({**{k: v for k, v in state.items() if not k.startswith("rv_embedding.")}, **own})
    with torch.no_grad():
        compare(camera(None, img, metas)["tasks"][0], single, "out_camera/")
        compare(lidar(pts, None, metas)["tasks"][0], single, "out_lidar/")


def test_task_head(shared):
    golden = load(shared, "task_head.npz")
    norm = GroupLayerNorm1d(12, 3)
    close(norm(golden["gln/in_batch_channel_query"]), golden["gln/out_groups3_unit_affine"])
    state = {k[len("state/"):]: v for k, v in golden.items() if k.startswith("state/")}
    head = SeparateTaskHead(32, 4, 3, head_channels=state["center.1.weight"].numel() // 3)
    given = {k: v for k, v in state.items() if k.split(".")[0] in ("center", "cls_logits")}
    missing = head.load_state_dict(given, strict=False)
    assert not missing.unexpected_keys and not any(k.startswith(("center.", "cls_logits.")) for k in missing.missing_keys)
    out = head(golden["in/x_layers_batch_query_channel"])
    close(out["center"], golden["out/center"])
    close(out["cls_logits"], golden["out/cls_logits"])


def test_decoding(shared):
    golden = load(shared, "coder.npz")
    config = golden["config_json"]
    predictions = {k: golden[f"in/{k}"][config["layer_used"]] for k in BRANCHES}
    for b in range(2):
        boxes, scores, labels, query = decode_predictions(
            predictions["cls_logits"][b], codes_of(predictions)[b], config["max_num"], config["post_center_range"])
        close(boxes, golden[f"out/{b}/boxes_bottom_center"])
        close(scores, golden[f"out/{b}/scores"])
        assert torch.equal(labels, golden[f"out/{b}/labels"])


def samples_of(golden, metas):
    samples = []
    for b, meta in enumerate(metas):
        boxes = LiDARInstance3DBoxes(golden[f"in/{b}/gt_boxes9_bottom_center"], box_dim=9)
        instances = InstanceData(bboxes_3d=boxes, labels_3d=golden[f"in/{b}/gt_labels"])
        samples.append(Det3DDataSample(metainfo=meta, gt_instances_3d=instances))
    return samples


def test_training_losses(shared, golden, monkeypatch):
    train = load(shared, "dn_train.npz")
    head = build_head(golden["config_json"])
    head.load_state_dict(state_of(golden))
    head.train()
    head.shared_conv.bn.eval()
    pts, img, metas = inputs_of(golden)
    fixed = functools.partial(head_module.make_denoising, noise=train["in/uniform_noise_0_1"] * 2 - 1)
    monkeypatch.setattr(head_module, "make_denoising", fixed)
    samples, outputs = samples_of(train, metas), {}
    head.register_forward_hook(lambda m, args, out: outputs.update(out))
    losses = head.loss(pts, img, samples)
    compare(outputs["tasks"][0], train, "out/")
    compare(outputs["dn_tasks"][0], train, "out/dn_")
    assert set(losses) == {k[len("loss/"):] for k in train if k.startswith("loss/")}
    for name, value in losses.items():
        close(value, train[f"loss/{name}"])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_gravity_centre_is_read_from_bottom_boxes(shared):
    train = load(shared, "dn_train.npz")
    boxes, labels = head_module.ground_truth(samples_of(train, [{}, {}]), "cpu")
    close(torch.cat(boxes), torch.cat([gravity(train[f"in/{b}/gt_boxes9_bottom_center"]) for b in range(2)]))


def test_aqr_starts_as_cmt(golden):
    pts, img, metas = inputs_of(golden)
    cmt, aqr = (build_head(golden["config_json"], backend="reference", aqr=a).eval() for a in (None, AQR))
    state = state_of(golden)
    cmt.load_state_dict(state)
    missing = aqr.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(k.startswith(("aqr_router.", "aqr_bias.")) for k in missing.missing_keys)
    assert "aqr_bias.bias_scale" in missing.missing_keys
    with torch.no_grad():
        plain, out = cmt(pts, img, metas), aqr(pts, img, metas)
        assert not out["aqr"]["weights"].any()
        for name in BRANCHES:
            assert torch.equal(plain["tasks"][0][name], out["tasks"][0][name])
        compare(out["tasks"][0], golden, "out/")
        aqr.aqr_router.to_weights.weight.normal_(std=0.5)
        out = aqr(pts, img, metas)
        assert out["aqr"]["weights"].abs().amax() > 0.1
        assert (plain["tasks"][0]["cls_logits"] - out["tasks"][0]["cls_logits"]).abs().max() > 1e-3


def test_aqr_trains_with_denoising(golden, shared):
    head = build_head(golden["config_json"], aqr=AQR)
    head.load_state_dict(state_of(golden), strict=False)
    head.train()
    torch.nn.init.normal_(head.aqr_router.to_weights.weight, std=0.1)
    pts, img, metas = inputs_of(golden)
    seen = {}
    head.register_forward_hook(lambda m, args, out: seen.update(out))
    sum(head.loss(pts, img, samples_of(load(shared, "dn_train.npz"), metas)).values()).backward()
    assert seen["aqr"]["weights"].shape == (2, 54 + 60, 2)
    assert head.aqr_bias.bias_scale.grad.abs() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_predictions_carry_weights(golden):
    head = build_head(golden["config_json"], aqr=AQR).eval()
    torch.nn.init.normal_(head.aqr_router.to_weights.weight, std=0.5)
    pts, img, metas = inputs_of(golden)
    with torch.no_grad():
        results = head.predict(pts, img, [Det3DDataSample(metainfo=m) for m in metas])
    for result in results:
        assert len(result) <= 300 and result.bboxes_3d.tensor.shape[1] == 9
        assert result.aqr_weights.shape == (len(result), 2)
        assert (result.scores_3d.diff() <= 0).all()


def test_two_tasks_share_the_queries(golden):
    """Classes spread over two tasks: labels count through, every box trains one task."""
    tasks = [dict(class_names=list("abc")), dict(class_names=list("defghij"))]
    head = build_head(golden["config_json"], tasks=tasks)
    pts, img, metas = inputs_of(golden)
    boxes = LiDARInstance3DBoxes(torch.rand(4, 9) + 0.5, box_dim=9)
    instances = InstanceData(bboxes_3d=boxes, labels_3d=torch.tensor([0, 3, 9, 9]))
    losses = head.loss(pts, img, [Det3DDataSample(metainfo=m, gt_instances_3d=instances) for m in metas])
    assert all(v.isfinite() for v in losses.values())
    labels = torch.cat([r.labels_3d for r in head.eval().predict(pts, img, [Det3DDataSample(metainfo=m) for m in metas])])
    assert labels.min() >= 0 and 3 <= labels.max() <= 9


def test_bad_input_says_what_to_do(golden):
    head = build_head(golden["config_json"])
    pts, img, metas = inputs_of(golden)
    with pytest.raises(ValueError, match="no sensor left"):
        head(None, None, metas)
    with pytest.raises(ValueError, match="grid_size"):
        head(pts[..., :8, :], img, metas)
    with pytest.raises(ValueError, match="image feature"):
        head(pts, img[:-1], metas)
    with pytest.raises(ValueError, match="lidar2img"):
        head(pts, img, [dict(pad_shape=(64, 160))] * 2)
    with pytest.raises(ValueError, match="batch_input_shape"):
        head(pts, img, [dict(lidar2img=m["lidar2img"]) for m in metas])
    with pytest.raises(ValueError, match="needs a sensor"):
        build_head(golden["config_json"], in_channels=None, use_camera=False)
    with pytest.raises(ValueError, match="voxel_size"):
        build_head(golden["config_json"], voxel_size=None)
    with pytest.raises(ValueError, match="9 numbers"):
        boxes = LiDARInstance3DBoxes(torch.rand(1, 7), box_dim=7)
        instances = InstanceData(bboxes_3d=boxes, labels_3d=torch.zeros(1, dtype=torch.long))
        head_module.ground_truth([Det3DDataSample(gt_instances_3d=instances)], "cpu")


def test_codes_of_ground_truth_are_what_the_head_predicts():
    """Branch names and code order meet: `height` holds ln dx, `dim` ln dy, z, ln dz."""
    box = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.5, 7, 8]])
    code = encode_boxes(box)[0]
    assert torch.allclose(code[2:6].exp()[[0, 1, 3]], box[0, 3:6]) and code[4] == 3
