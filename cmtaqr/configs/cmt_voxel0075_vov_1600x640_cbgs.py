"""CMT, VoVNet-99, 0.075 m voxels, 1600x640 images, class-balanced sampling."""
_base_ = ["./_base_/cmt.py", "./_base_/schedule.py", "./_base_/runtime.py"]

peak = 8.0
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(eta_min_ratio=peak)
