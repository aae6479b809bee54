"""AQR on CMT, ResNet-50, 0.1 m voxels, 800x320 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0100_r50_800x320_cbgs.py", "./_base_/aqr.py"]

model = dict(pts_bbox_head=dict(aqr=_base_.aqr))
