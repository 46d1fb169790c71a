"""Package metadata lives in pyproject.toml; this file only names the version."""

from setuptools import setup

setup(version="0.1.0")
