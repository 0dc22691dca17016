"""Operators of pliant's own: fused forms of what PyTorch does in many small steps.

Importing this package defines them and builds nothing. `building.ready` builds the native
form on first use; without a compiler each operator runs in its PyTorch form.
"""
