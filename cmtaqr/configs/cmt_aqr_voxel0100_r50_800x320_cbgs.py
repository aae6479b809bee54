"""AQR on CMT, ResNet-50, 0.1 m voxels, 800x320 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0100_r50_800x320_cbgs.py", "./_base_/aqr.py", "./_base_/aqr_schedule.py"]

model = dict(pts_bbox_head=dict(aqr=_base_.aqr))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **_base_.learning_rates)))
