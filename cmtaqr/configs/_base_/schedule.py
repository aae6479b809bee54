"""AdamW with CMT's cyclic schedule: in the first 40 % of the iterations each group's learning rate goes to `peak` times its base,
then to 1e-4 of it, both along half a cosine; beta1 goes the other way. Written for 20 epochs; a run of another length
(`epochs` or `max_iters`) stretches it, see nbs/52_runner.ipynb."""
max_epochs = 20
precision = "bf16"  # of a training on a GPU; the fp32 islands are listed in nbs/35b_precision.ipynb
peak_epoch = 8
peak = 6.0

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="GroupedOptimWrapperConstructor",  # one optimiser group per key below
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=35, norm_type=2),
    paramwise_cfg=dict(
        custom_keys={
            "img_backbone": dict(lr_mult=0.01, decay_mult=5.0),
            "img_neck": dict(lr_mult=0.1),
            "bias_scale": dict(lr_mult=0.5, decay_mult=0.0),
        }
    ),
)

param_scheduler = [
    dict(
        type="CosineAnnealingLR", eta_min_ratio=peak, begin=0, end=peak_epoch, T_max=peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR", eta_min_ratio=1e-4, begin=peak_epoch, end=max_epochs, T_max=max_epochs - peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum", eta_min_ratio=0.85 / 0.95, begin=0, end=peak_epoch, T_max=peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingMomentum", eta_min_ratio=1.0, begin=peak_epoch, end=max_epochs, T_max=max_epochs - peak_epoch,
        by_epoch=True, convert_to_iter_based=True,
    ),
]

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=16)
