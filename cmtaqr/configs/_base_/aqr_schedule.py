"""Training AQR on a trained CMT: its encoders stand still, its decoder follows slowly, what is new learns at the full rate.

`frozen` are modules that a run freezes, unless its parameter `freeze` says otherwise; see nbs/52a_freeze.ipynb. Their learning rates
are those of a run that trains everything. A parameter takes the longest key that is part of its name, so keys are whole paths.
"""
frozen = ["img_backbone", "pts_voxel_encoder", "pts_middle_encoder", "pts_backbone"]

learning_rates = {
    "img_backbone": dict(lr_mult=0.01, decay_mult=5.0),  # as in the training of CMT
    "pts_middle_encoder": dict(lr_mult=0.05),
    "pts_backbone": dict(lr_mult=0.05),
    "img_neck": dict(lr_mult=0.05),
    "pts_neck": dict(lr_mult=0.05),
    "pts_bbox_head.shared_conv": dict(lr_mult=0.5),
    "pts_bbox_head.bev_embedding": dict(lr_mult=0.5),
    "pts_bbox_head.rv_embedding": dict(lr_mult=0.5),
    "pts_bbox_head.reference_points": dict(lr_mult=0.3),
    "pts_bbox_head.transformer": dict(lr_mult=0.5),
    "pts_bbox_head.task_heads": dict(lr_mult=0.8),
    "pts_bbox_head.aqr_": dict(lr_mult=1.0),  # router, bias, and what versions 1 and 2 have instead
    "pts_bbox_head.aqr_bias.bias_scale": dict(lr_mult=0.5, decay_mult=0.0),
}
