"""AQR on a small CMT for the synthetic world: trains on two CPU cores."""
_base_ = ["./_base_/nuscenes.py", "./_base_/schedule.py", "./_base_/runtime.py"]

# Data: the launcher derives loaders and metric from these, see _base_/nuscenes.py.
data_root = "data/demo"
point_cloud_range = [-32.0, -32.0, -5.0, 32.0, 32.0, 3.0]
input_size = (128, 320)
sweeps_num = 0
batch_size = 2
num_workers = 1
cbgs = False
# A short run from random weights does not have the time to learn frames without a sensor: no modality is masked.
augmentation = dict(
    resize=(1.0, 1.1), flip_image=0.0, rotation=(-0.4, 0.4), scale=(0.95, 1.05), translation=0.0, flip_scene=0.5,
    drop_image=0.0, drop_lidar=0.0,
)

# Model
voxel_size = [0.2, 0.2, 0.2]
grid_size = [320, 320, 40]
sparse_shape = [41, 320, 320]
out_size_factor = 8
hidden_dim = 128
image_width = 16

lidar_norm = dict(type="BN", eps=1e-3, momentum=0.01)

model = dict(
    type="CmtDetector",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor", mean=[103.530, 116.280, 123.675], std=[57.375, 57.120, 58.395], pad_size_divisor=32,
    ),
    grid_mask_prob=0.0,
    img_backbone=dict(
        type="mmdet.ResNet", depth=18, base_channels=image_width, num_stages=4, out_indices=(2, 3),
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False, style="pytorch",
    ),
    img_neck=dict(type="CPFPN", in_channels=[4 * image_width, 8 * image_width], out_channels=hidden_dim, num_outs=2),
    pts_voxel_encoder=dict(
        type="LidarVoxelizer", voxel_size=voxel_size, point_cloud_range=point_cloud_range, max_num_points=10,
        max_voxels=(30000, 40000), sparse_shape=sparse_shape,
    ),
    pts_middle_encoder=dict(
        type="SparseEncoder", in_channels=5, sparse_shape=sparse_shape, base_channels=16, output_channels=64,
        order=("conv", "norm", "act"), encoder_channels=((16,), (32, 32), (48, 48), (64, 64)),
        encoder_paddings=((1,), (1, 1), (1, 1), ((0, 1, 1), 1)), block_type="conv_module",
        norm_cfg=dict(type="BN1d", eps=1e-3, momentum=0.01),
    ),
    pts_backbone=dict(
        type="SECOND", in_channels=128, out_channels=[64, 128], layer_nums=[3, 3], layer_strides=[1, 2], norm_cfg=lidar_norm,
        conv_cfg=dict(type="Conv2d", bias=False),
    ),
    pts_neck=dict(
        type="SECONDFPN", in_channels=[64, 128], out_channels=[64, 64], upsample_strides=[1, 2], norm_cfg=lidar_norm,
        upsample_cfg=dict(type="deconv", bias=False), use_conv_for_no_stride=True,
    ),
    pts_bbox_head=dict(
        type="CmtHead",
        in_channels=128,
        hidden_dim=hidden_dim,
        num_query=300,
        depth_num=32,
        head_channels=64,
        tasks=[dict(class_names=_base_.class_names)],
        point_cloud_range=point_cloud_range,
        voxel_size=voxel_size,
        grid_size=grid_size,
        out_size_factor=out_size_factor,
        max_num=300,
        post_center_range=[-36.0, -36.0, -10.0, 36.0, 36.0, 10.0],
        denoising=dict(groups=3, noise_scale=1.0),
        transformer=dict(
            type="CmtTransformer",
            decoder=dict(num_layers=2, layer=dict(embed_dims=hidden_dim, num_heads=4, feedforward_channels=512, dropout=0.0)),
        ),
        # From random weights the attention is flat at first. A window of 9 in 2560 keys needs a bias near ln(2551/9) = 5.6 to
        # hold half of it, hence the larger scale and the positive first weight: queries begin by looking at their own place.
        aqr=dict(
            views="all",
            initial_weight=0.8,
            router=dict(type="AQRWeightGenerator", num_heads=4, feedforward_channels=256, dropout=0.0, window_sizes=[4, 3]),
            bias=dict(
                type="AttentionBiasGenerator", preset="aggressive", bias_scale=5.0, window_size=[3, 3], learnable_scale=True,
                use_local_bias=True, use_gaussian_window=False,
            ),
        ),
    ),
)

# Optimisation: from random weights, so the image branch learns as fast as the rest. The learning rate rises to 10 times its base in
# the first 15 % of the run.
peak_epoch = 3
precision = "fp32"
optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(custom_keys={"img_backbone": dict(lr_mult=1.0, decay_mult=1.0), "img_neck": dict(lr_mult=1.0)}),
)
param_scheduler = [
    dict(
        type="CosineAnnealingLR", eta_min_ratio=10.0, begin=0, end=peak_epoch, T_max=peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR", eta_min_ratio=0.1, begin=peak_epoch, end=_base_.max_epochs, T_max=_base_.max_epochs - peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
]
