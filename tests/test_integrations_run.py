import subprocess
import sys
from urllib.request import urlopen

SCRIPT = """
import torch
from stable_baselines3 import PPO

from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.reference.faults import Fault, FaultInjector

torch.set_num_threads(1)
model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=1, device="cpu")
injector = FaultInjector(model.policy, [Fault("nan", 7, 2)])
callback = EsperCallback(address="127.0.0.1:0", on_critical="skip", before_check=injector)
model.learn(32, callback=callback)
print(callback.exporter.url, flush=True)
"""


def test_the_wait_for_a_scrape_of_something_bad_belongs_to_the_end_of_the_process():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().strip()  # learn() has returned
        waiting = next(line for line in process.stderr if "waiting for" in line)
        assert f"{url}/metrics" in waiting
        with urlopen(f"{url}/metrics", timeout=10) as page:
            assert b"\nesper_nan_grad_recent_max 7.0\n" in page.read()
        assert process.wait(10) == 0
