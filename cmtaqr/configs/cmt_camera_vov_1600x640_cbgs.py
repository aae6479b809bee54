"""CMT from cameras alone, VoVNet-99, 1600x640 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0075_vov_1600x640_cbgs.py"]

sensors = ["camera"]
paste = None
augmentation = dict(
    rotation=(-0.3925, 0.3925), scale=(0.95, 1.05), translation=0.0, flip_scene=0.0, drop_image=0.0, drop_lidar=0.0,
)

model = dict(
    grid_mask_prob=0.0,
    pts_voxel_encoder=None,
    pts_middle_encoder=None,
    pts_backbone=None,
    pts_neck=None,
    pts_bbox_head=dict(in_channels=None),
)
