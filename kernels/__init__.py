"""Triton kernels with their configuration tables; importing a module here imports Triton."""
