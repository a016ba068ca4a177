"""Everything around the trainer: the servers' configurations, containers, Kubernetes, and the native stack."""
