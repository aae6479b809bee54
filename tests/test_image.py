"""Image backbone and neck against numbers and names of the released detector."""
import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
from cmtaqr.detector.image import CPFPN  # noqa: E402
from cmtaqr.detector.vovnet import OSAStage, VoVNetCP  # noqa: E402


def test_matches_the_released_neck(shared):
    golden = np.load(shared / "golden" / "neck_osa.npz")
    neck = CPFPN((12, 20), 8, num_outs=2)
    prefix = "neck/state/"
    neck.load_state_dict({k[len(prefix):]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith(prefix)})
    outputs = neck([torch.from_numpy(golden[f"neck/in{i}"]) for i in range(2)])
    for i, out in enumerate(outputs):
        torch.testing.assert_close(out, torch.from_numpy(golden[f"neck/out{i}"]), rtol=1e-5, atol=1e-5)


def test_names_of_the_neck(shared):
    entries = json.loads((shared / "golden" / "keys_r50.json").read_text())["entries"]
    want = {k[len("img_neck."):]: list(v[0]) for k, v in entries.items() if k.startswith("img_neck.")}
    assert {k: list(v.shape) for k, v in CPFPN((1024, 2048), 256, num_outs=2).state_dict().items()} == want


def test_matches_the_released_vovnet_stage(shared):
    golden = np.load(shared / "golden" / "neck_osa.npz")
    stage = OSAStage(3, 12, 8, 24, num_blocks=2, num_convs=3, norm_cfg=dict(type="BN")).eval()
    prefix = "osa/state/"
    stage.load_state_dict({k[len(prefix):]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith(prefix)})
    with torch.no_grad():
        out, want = stage(torch.from_numpy(golden["osa/in"])), torch.from_numpy(golden["osa/out"])
    assert (out - want).abs().max() <= 1e-5 * want.abs().max()


def test_names_of_vovnet(shared):
    entries = json.loads((shared / "golden" / "keys_vov.json").read_text())["entries"]
    want = {k[len("img_backbone."):]: list(v[0]) for k, v in entries.items() if k.startswith("img_backbone.")}
    assert {k: list(v.shape) for k, v in VoVNetCP("V-99-eSE").state_dict().items()} == want
