"""What has to be said before anything is imported."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton is told once, and other libraries import it too

# No test is timed: how long an example takes says how busy the machine is.
settings.register_profile("esper", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("esper")
