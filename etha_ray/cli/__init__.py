"""The command line, ``etha-ray``: `explain` looks at a plan, `bench` measures."""

from etha_ray.cli.app import app, main

__all__ = ["app", "main"]
