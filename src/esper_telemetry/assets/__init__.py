"""Rules, runbooks, dashboard and manifests: shipped with the package, written with your own addresses filled in."""
