"""CMT in its largest form, LiDAR in voxels of 0.075 m and VoVNet-99 on 1600x640 images; other configs say what differs."""
_base_ = ["./nuscenes.py"]

input_size = (640, 1600)
batch_size = 2  # per GPU
paste = dict()  # the released recipe

voxel_size = [0.075, 0.075, 0.2]
grid_size = [1440, 1440, 40]
sparse_shape = [41, 1440, 1440]
out_size_factor = 8
hidden_dim = 256

lidar_norm = dict(type="BN", eps=1e-3, momentum=0.01)

model = dict(
    type="CmtDetector",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor", mean=[103.530, 116.280, 123.675], std=[57.375, 57.120, 58.395], pad_size_divisor=32,
    ),
    grid_mask_prob=0.7,
    img_backbone=dict(
        type="VoVNetCP", spec_name="V-99-eSE", out_features=("stage4", "stage5"), frozen_stages=-1, norm_eval=True, with_cp=True,
    ),
    img_neck=dict(type="CPFPN", in_channels=[768, 1024], out_channels=hidden_dim, num_outs=2),
    pts_voxel_encoder=dict(
        type="LidarVoxelizer", voxel_size=voxel_size, point_cloud_range=_base_.point_cloud_range, max_num_points=10,
        max_voxels=(120000, 160000), sparse_shape=sparse_shape,
    ),
    pts_middle_encoder=dict(
        type="SparseEncoder", in_channels=5, sparse_shape=sparse_shape, base_channels=16, output_channels=128,
        order=("conv", "norm", "act"), encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, (0, 1, 1)), (0, 0)), block_type="basicblock",
        norm_cfg=dict(type="BN1d", eps=1e-3, momentum=0.01),
    ),
    pts_backbone=dict(
        type="SECOND", in_channels=256, out_channels=[128, 256], layer_nums=[5, 5], layer_strides=[1, 2], norm_cfg=lidar_norm,
        conv_cfg=dict(type="Conv2d", bias=False),
    ),
    pts_neck=dict(
        type="SECONDFPN", in_channels=[128, 256], out_channels=[256, 256], upsample_strides=[1, 2], norm_cfg=lidar_norm,
        upsample_cfg=dict(type="deconv", bias=False), use_conv_for_no_stride=True,
    ),
    pts_bbox_head=dict(
        type="CmtHead",
        in_channels=512,
        hidden_dim=hidden_dim,
        num_query=900,
        depth_num=64,
        tasks=[dict(class_names=_base_.class_names)],
        point_cloud_range=_base_.point_cloud_range,
        voxel_size=voxel_size,
        grid_size=grid_size,
        out_size_factor=out_size_factor,
        max_num=300,
        post_center_range=[-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
        denoising=dict(groups=10, noise_scale=1.0),
        loss=dict(
            code_weights=(2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2), cls_weight=2.0, bbox_weight=0.25, dn_weight=1.0,
            dn_split=0.75,
        ),
        transformer=dict(
            type="CmtTransformer",
            decoder=dict(
                type="PETRTransformerDecoder",
                num_layers=6,
                layer=dict(
                    type="PETRTransformerDecoderLayer", embed_dims=hidden_dim, num_heads=8, feedforward_channels=1024,
                    dropout=0.1, self_attn=dict(type="PETRMultiheadAttention"),
                    cross_attn=dict(type="PETRMultiheadFlashAttention"),
                ),
            ),
        ),
    ),
)
