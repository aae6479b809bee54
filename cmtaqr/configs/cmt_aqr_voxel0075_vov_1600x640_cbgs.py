"""AQR on CMT, VoVNet-99, 0.075 m voxels, 1600x640 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0075_vov_1600x640_cbgs.py", "./_base_/aqr.py", "./_base_/aqr_schedule.py"]

# A camera cell covers half as much of the scene as with 800x320 images: 15 cells here look as far as 8 there.
aqr = _base_.aqr
aqr.router.update(window_sizes=[15, 5])
aqr.bias.update(window_size=15, gaussian_sigma=2.5)

model = dict(pts_bbox_head=dict(aqr=aqr))

optim_wrapper = dict(
    optimizer=dict(lr=2e-4), paramwise_cfg=dict(custom_keys=dict(_delete_=True, **_base_.learning_rates)),
)
