"""AQR on CMT, VoVNet-99, 0.075 m voxels, 1600x640 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0075_vov_1600x640_cbgs.py", "./_base_/aqr.py"]

# A camera cell covers half as much of the scene as with 800x320 images: 15 cells here look as far as 8 there.
aqr = _base_.aqr
aqr.router.update(window_sizes=[15, 5])
aqr.bias.update(window_size=15, gaussian_sigma=2.5)

model = dict(pts_bbox_head=dict(aqr=aqr))
