"""What is asked of CUDA's driver, and what torch makes of the memory it maps."""
