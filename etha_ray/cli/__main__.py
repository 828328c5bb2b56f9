"""``python -m etha_ray.cli``."""

from etha_ray.cli import main

main()
