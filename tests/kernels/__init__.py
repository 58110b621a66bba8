"""The kernels, under Triton's interpreter or on a GPU."""
