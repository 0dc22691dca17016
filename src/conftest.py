"""Which modules pytest can look into for doctests."""

from importlib.util import find_spec

# Triton comes with PyTorch's builds for GPUs, and not on every system.
_TRITON = ["pliant/ops/_triton_kernels.py", "pliant/ops/_triton_launch.py"]
collect_ignore = [] if find_spec("triton") else _TRITON
