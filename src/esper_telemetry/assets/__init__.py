"""Rules, runbooks, dashboard and manifests, which come with the package and are written with one's own addresses in."""
