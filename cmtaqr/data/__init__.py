"""Data: the synthetic world needs NumPy and OpenCV alone; frames, transforms and pipelines need mmdet3d."""
