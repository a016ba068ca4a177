"""What has to be said before anything is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton is told once, and other libraries import it too
