"""What pyproject.toml cannot say: the wheel has ds_configs/, a folder of the repository, inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hift_ds*", "model_zoo*"]), "hift_ds.ds_configs"],
    package_dir={"hift_ds.ds_configs": "ds_configs"},
)
