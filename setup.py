"""What pyproject.toml cannot say: configs/NAME is installed as the folder NAME/configs, and configs/recipes/NAME as its
folder recipes. All else stands there."""

from pathlib import Path

from setuptools import find_packages, setup

NAMES = ("odvae", "lvdm", "app")
CONFIGS = {f"{name}.configs": f"configs/{name}" for name in NAMES} | {
    f"{folder.name}.configs.recipes": str(folder) for folder in Path("configs/recipes").iterdir() if folder.is_dir()}

setup(packages=[*find_packages(include=[f"{name}*" for name in NAMES]), *CONFIGS], package_dir=CONFIGS)
