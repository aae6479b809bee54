"""AQR for `pts_bbox_head.aqr`, with the windows of 800x320 images; window sizes are in cells, [camera, lidar] or one for both."""
aqr = dict(
    views="all",
    router=dict(type="AQRWeightGenerator", num_heads=4, feedforward_channels=1024, dropout=0.1, window_sizes=[8, 5]),
    bias=dict(
        type="AttentionBiasGenerator", preset="conservative", window_size=8, learnable_scale=True, use_local_bias=True,
        use_gaussian_window=False, gaussian_sigma=1.0,
    ),
)
