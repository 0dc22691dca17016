"""Benchmarks: the speed tables of ``results/``."""
