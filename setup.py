"""What pyproject.toml cannot say: configs/NAME is installed as the folder NAME/configs. All else stands there."""

from setuptools import find_packages, setup

NAMES = ("odvae", "lvdm", "app")

setup(packages=[*find_packages(include=[f"{name}*" for name in NAMES]), *(f"{name}.configs" for name in NAMES)],
      package_dir={f"{name}.configs": f"configs/{name}" for name in NAMES})
