"""Measuring: parameters, multiply-accumulates, latency; rows and tables of them.

The function is `pliant.measure`; the package is named otherwise, so that neither
hides the other.
"""
