"""AQR on CMT, ResNet-50, 0.1 m voxels, 800x320 images, class-balanced sampling."""
_base_ = ["./cmt_voxel0100_r50_800x320_cbgs.py"]

model = dict(
    pts_bbox_head=dict(
        aqr=dict(
            views="all",
            router=dict(type="AQRWeightGenerator", num_heads=4, feedforward_channels=1024, dropout=0.1, window_sizes=[8, 5]),
            bias=dict(
                type="AttentionBiasGenerator", preset="conservative", window_size=8, learnable_scale=True, use_local_bias=True,
                use_gaussian_window=False,
            ),
        ),
    ),
)
