"""Measuring: parameters, multiply-accumulates, latency, accuracy; rows and tables of them."""
