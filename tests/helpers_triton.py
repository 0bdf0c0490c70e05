"""Where Triton kernels can run here: on a GPU, or on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRETED,
    reason="Triton kernels need a CUDA device, or triton installed and TRITON_INTERPRET=1",
)
