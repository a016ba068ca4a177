"""What a terminal shows of a run: a progress bar, and the status banner."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from esper_telemetry.health import HealthTier
from esper_telemetry.snapshot import Snapshot

_STYLES = {HealthTier.WARNING: "bold red", HealthTier.CRITICAL: "bold red reverse"}


class Display(Protocol):
    """Shows a run as it goes."""

    def progress(self, episodes: int, snapshot: Snapshot) -> None:
        """Show how far the run is."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def banner(inf: int, nan: int) -> Text:
    """Return nothing when healthy, else `NaN:1 Inf:2`; red bold from 1, red bold reversed above 5."""
    shown = [(f"{name}:{count}", HealthTier.of(count)) for name, count in (("NaN", nan), ("Inf", inf)) if count]
    return Text(" ").join(Text(text, style=_STYLES[tier]) for text, tier in shown)


def open_display(episodes: int) -> Display:
    """Return a live display on a terminal, plain lines elsewhere."""
    return TerminalDisplay(episodes) if sys.stdout.isatty() else LineDisplay(episodes)


class TerminalDisplay:
    """Draw a progress bar and, below it, the banner: the worst of the recent window, so that it can be read."""

    def __init__(self, episodes: int, console: Console | None = None) -> None:
        self._bar = Progress(
            TextColumn("episodes {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("reward {task.fields[reward]}  updates {task.fields[updates]}  checks {task.fields[checks]}"),
            TimeRemainingColumn(),
        )
        self._task: TaskID = self._bar.add_task("", total=episodes, reward="-", updates=0, checks=0)
        self._live = Live(self._bar, console=console, refresh_per_second=8)
        self._live.start()

    def progress(self, episodes: int, snapshot: Snapshot) -> None:
        """Move the bar, and show the banner while a bad check is recent."""
        self._bar.update(
            self._task,
            completed=episodes,
            reward=_reward(snapshot),
            updates=snapshot.ppo.update if snapshot.ppo else 0,
            checks=snapshot.checks,
        )
        recent = snapshot.recent.read(time.monotonic())
        line = banner(recent.inf_max, recent.nan_max)
        self._live.update(Group(self._bar, line) if line else self._bar)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()


class LineDisplay:
    """Print a line per PPO update, for logs."""

    def __init__(self, episodes: int) -> None:
        self._episodes = episodes
        self._updates = 0

    def progress(self, episodes: int, snapshot: Snapshot) -> None:
        """Print the update when it is a new one."""
        ppo = snapshot.ppo
        if ppo is None or ppo.update == self._updates:
            return
        self._updates = ppo.update
        line = (
            f"update {ppo.update}  episodes {episodes}/{self._episodes}  reward {_reward(snapshot)}  "
            f"checks {snapshot.checks}  {banner(ppo.inf_grad_count, ppo.nan_grad_count).plain}"
        )
        print(line.rstrip(), flush=True)

    def close(self) -> None:
        """Do nothing: every line is out."""


def _reward(snapshot: Snapshot) -> str:
    reward = snapshot.ppo.episode_reward if snapshot.ppo else None
    return "-" if reward is None else f"{reward:.1f}"
