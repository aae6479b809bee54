"""How a run behaves: hooks, logs, seeds. Values that a run can change are parameters, see nbs/50_parameters.ipynb."""
default_scope = "mmdet3d"
custom_imports = dict(
    imports=["cmtaqr.detector", "cmtaqr.data.frames", "cmtaqr.data.transforms", "cmtaqr.data.paste", "cmtaqr.engine"],
    allow_failed_imports=False,
)

default_hooks = dict(
    runtime_info=dict(type="RuntimeInfoHook"),
    timer=dict(type="IterTimerHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2, save_last=True),
)
custom_hooks = [
    dict(type="FreezeHook"),  # freezes what the variable `frozen` names, if a config has it
    dict(type="ScaleHook"),
    dict(type="HistoryHook"),
    dict(type="InstrumentsHook"),  # what AQR decides, every 50 iterations; says once that it has nothing to do where there is no AQR
    dict(type="ProgressHook"),
    dict(type="PasteFadeHook"),  # does nothing where the config does not paste
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
log_level = "INFO"
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
randomness = dict(seed=0, deterministic=False)
load_from = None
resume = False
