"""Pasted objects: pixels against golden values, sampling against a plain count, and whole frames of a synthetic world."""
import numpy as np
import pytest

pytest.importorskip("mmdet3d")
from cmtaqr.data.paste import paste_patches  # noqa: E402


def test_patches_agree_with_golden(shared):
    golden = np.load(shared / "golden/augment.npz")
    corners = golden["paste/in/corners_box0_1_are_original_2_3_4_are_pasted"]
    patches = [golden[f"paste/in/patch{i}_for_box{i + 2}"] for i in range(3)]
    images, matrices = ([golden[f"paste/in/{key}{view}"] for view in range(2)] for key in ("image", "lidar2img"))
    out = paste_patches(images, corners, np.stack(matrices), patches)
    for view in range(2):
        difference = np.abs(out[view].astype(int) - golden[f"paste/out/image{view}"])
        assert difference.max() <= 1, (view, difference.max())
        assert (out[view] != images[view]).any()
