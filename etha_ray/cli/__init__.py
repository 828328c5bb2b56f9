"""The command line, ``etha-ray``.

Every command ends with 0 when all is well, 1 when something is wrong (an error, an agent that is not well, a check that fails, wrong
bytes), and 2 when it is used wrongly.
"""

from etha_ray.cli.app import app, main

__all__ = ["app", "main"]
