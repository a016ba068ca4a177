"""Monitors in a state that tests begin with."""


def learned(monitor):
    """Return a monitor that knows already, as after a first pass, that nobody takes the gradients away."""
    for tag in monitor._gathering.watched.tags:
        tag.early = False
    return monitor
