"""CMT, ResNet-50, 0.1 m voxels, 800x320 images, class-balanced sampling."""
_base_ = ["./_base_/cmt.py", "./_base_/schedule.py", "./_base_/runtime.py"]

input_size = (320, 800)
batch_size = 4

# The range spans 1080 voxels, the declared grid 1024: released checkpoints have learnt it so, and voxels beyond are dropped.
voxel_size = [0.1, 0.1, 0.2]
grid_size = [1024, 1024, 40]
sparse_shape = [41, 1024, 1024]

model = dict(
    img_backbone=dict(
        _delete_=True, type="mmdet.ResNet", depth=50, num_stages=4, out_indices=(2, 3), frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True, with_cp=True, style="pytorch",
    ),
    img_neck=dict(in_channels=[1024, 2048]),
    pts_voxel_encoder=dict(voxel_size=voxel_size, sparse_shape=sparse_shape),
    pts_middle_encoder=dict(sparse_shape=sparse_shape),
    pts_bbox_head=dict(voxel_size=voxel_size, grid_size=grid_size),
)

optim_wrapper = dict(optimizer=dict(lr=1.4e-4))
auto_scale_lr = dict(base_batch_size=32)
