"""Ray applications built on etha_ray. Not part of the wheel: they use its public names only."""
