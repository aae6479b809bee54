"""CMT, ResNet-50, 0.1 m voxels, 800x320 images, class-balanced sampling."""
_base_ = ["./_base_/cmt_r50.py", "./_base_/schedule.py", "./_base_/runtime.py"]
