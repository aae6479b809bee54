"""Data: the synthetic world, nuScenes, transforms.

The world needs NumPy and OpenCV alone. Where mmdet3d is installed, importing this package registers the data set and the
transforms with it.
"""
from importlib.util import find_spec

if find_spec("mmdet3d"):
    from cmtaqr import detector  # first: it chooses the sparse library, which mmdet3d takes when it is imported

    from . import frames, transforms
