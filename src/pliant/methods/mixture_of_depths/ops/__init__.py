"""The Mixture-of-Depths block as one operator: in C++ for PyTorch and ONNX Runtime, in Triton for GPUs.

Importing this package defines the operators and builds nothing. `building.ready` builds the native
form when a network is optimised; without a compiler each operator runs in its PyTorch form.
"""
