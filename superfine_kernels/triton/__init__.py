"""Triton kernels: the portable GPU path.

Imported on first use, so that `import superfine_kernels` never loads Triton.
"""

import contextlib

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the interpreter on none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
