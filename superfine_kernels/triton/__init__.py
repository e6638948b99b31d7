"""Triton kernels: the portable GPU path.

Imported on first use, so that `import superfine_kernels` never loads Triton.
"""
