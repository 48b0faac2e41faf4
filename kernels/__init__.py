"""Kernels of Flag-DiT."""
