"""Kernels: SIMD for the engine `jit`, CUDA C with its shipped PTX, and the PTX machine that runs it without a GPU."""
