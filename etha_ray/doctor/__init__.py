"""What this machine lacks, and what to do about it: one line a check."""

from etha_ray.doctor.check import Check
from etha_ray.doctor.run import examine

__all__ = ["Check", "examine"]
