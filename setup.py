"""Lists the packages: each top-level folder is the sub-package `inferloom.<folder>` (see pyproject.toml)."""

from setuptools import find_packages, setup

FOLDERS = ("ir", "compiler", "targets", "runtime", "models", "benchmarks")

setup(
    packages=["inferloom", *find_packages(".", include=["inferloom.*"]),
              *(f"inferloom.{name}" for folder in FOLDERS
                for name in find_packages(".", include=[folder, f"{folder}.*"]))],
)
