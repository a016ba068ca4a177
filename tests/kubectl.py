"""Manifests as kubectl makes them."""

import subprocess

import pytest
import yaml

from deploy.stack import servers


def kustomize(folder):
    """Return the manifests of a kustomization; skip where kubectl cannot be had."""
    try:
        kubectl = servers.find("kubectl")
    except servers.ProgramNotFound as error:
        pytest.skip(str(error))
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))
