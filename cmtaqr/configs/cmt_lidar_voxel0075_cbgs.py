"""CMT from LiDAR alone, 0.075 m voxels, class-balanced sampling."""
_base_ = ["./_base_/cmt.py", "./_base_/schedule.py", "./_base_/runtime.py"]

sensors = ["lidar"]
augmentation = dict(drop_image=0.0, drop_lidar=0.0)

model = dict(
    grid_mask_prob=0.0,
    img_backbone=None,
    img_neck=None,
    pts_bbox_head=dict(use_camera=False, final_kernel=3),  # neighbouring queries mix in the branches, as in the released weights
)
