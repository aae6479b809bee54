"""Packaging: everything is read from settings.ini; the extras are `detector` and `dev`."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
detector, dev = cfg["detector_requirements"].split(), cfg["dev_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["cmtaqr", "cmtaqr.*"]),
    package_data={"cmtaqr": ["configs/*.py", "configs/**/*.py"]},
    install_requires=cfg["requirements"].split(),
    # mmcv and mmdet3d are named with their exact versions: mmdet3d asserts them at import.
    extras_require={"detector": detector + ["mmcv==2.1.0", "mmdet3d==1.4.0"], "dev": dev},
    entry_points={"nbdev": ["cmtaqr=cmtaqr._modidx:d"]},
    zip_safe=False,
)
