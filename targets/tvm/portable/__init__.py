"""Kernels for devices that are reached by source code: OpenCL C and WGSL."""
