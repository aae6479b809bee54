"""Data of a nuScenes root, real or synthetic: a few variables, from which loaders and metric follow.

mmengine does not re-evaluate what follows from a variable that a child config or a run overrides. The launcher calls
`cmtaqr.data.pipelines.with_data(cfg)` after the last override; whoever loads a config with `Config.fromfile` alone does the same.
"""
_base_ = []

from cmtaqr.data.pipelines import data_settings

data_root = "data/nuscenes"
class_names = [
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
]
point_cloud_range = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]  # x0, y0, z0, x1, y1, z1 in metres
input_size = (320, 800)  # height, width
sweeps_num = 10
augmentation = dict(
    resize=(0.94, 1.25),  # relative to the factor that just covers the input
    flip_image=0.5,
    rotation=(-0.785, 0.785),
    scale=(0.9, 1.1),
    translation=0.5,
    flip_scene=0.5,
    drop_image=0.25,
    drop_lidar=0.25,
    rotate_empty=True,  # the released training does not rotate frames without boxes
)
sensors = ["lidar", "camera"]  # one of them: the other's files are not read
# One more variable, `paste`, is for children: a dict of what shall differ from `cmtaqr.data.pipelines.PASTE`, the released recipe
# of pasting objects of other frames. So `paste = dict()` is that recipe; None or absent pastes nothing. It is absent here because
# mmengine merges no dict into None. It needs the database of `python -m cmtaqr.data.database ROOT`, and ends after 75 % of a run.
batch_size = 4
num_workers = 6
cbgs = True

settings = data_settings(
    data_root, point_cloud_range, class_names, input_size, sweeps_num, augmentation, batch_size, num_workers, cbgs,
    sensors=sensors,
)
train_dataloader = settings["train_dataloader"]
val_dataloader = settings["val_dataloader"]
test_dataloader = settings["test_dataloader"]
val_evaluator = settings["val_evaluator"]
test_evaluator = settings["test_evaluator"]
del settings
