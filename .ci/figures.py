#!/usr/bin/env python3
"""Redraw the kept figures: the demo's from outputs/demo, those of the real frame, of attention and of training from nbs/results."""
import json
import shutil
from pathlib import Path

import cv2

from cmtaqr.attention.benchmark import plot_attention
from cmtaqr.engine.overfit import plot_overfit
from cmtaqr.engine.scaling import plot_scaling
from cmtaqr.engine.train_speed import plot_training

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "nbs" / "figures"


RESULTS = dict(overfit=("overfit_real_frame", plot_overfit), attention=("attention", plot_attention),
               training=("training", plot_training), scaling=("scaling", plot_scaling))


def measured():
    """The drawings of files of nbs/results."""
    for name, (source, plot) in RESULTS.items():
        plot(json.loads((ROOT / f"nbs/results/{source}.json").read_text())).savefig(FIGURES / f"{name}.png", dpi=80)


def demo():
    """The demo's drawings, small enough to be kept."""
    source = ROOT / "outputs/demo/eval/figures"
    for name in ("bev", "cameras"):
        image = cv2.imread(str(source / f"{name}.png"))
        if image is None:
            raise SystemExit(f"{source / name}.png is missing: run `make demo` first")
        width = 700 if name == "bev" else 1100
        image = cv2.resize(image, (width, round(image.shape[0] * width / image.shape[1])), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(FIGURES / f"demo_{name}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 85])
    shutil.copy(ROOT / "outputs/demo/result.json", ROOT / "nbs/results/demo.json")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    measured()
    demo()
