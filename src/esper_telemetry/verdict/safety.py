"""Whether a checkpoint is worth keeping now."""

from __future__ import annotations

from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.damage import WORDS


class Safety(int):
    """Be true or false, and say why.

    why: the reason in one line.
    """

    why: str

    def __new__(cls, safe: bool, why: str) -> Safety:
        made = super().__new__(cls, safe)
        made.why = why
        return made

    def __repr__(self) -> str:
        return f"{bool(self)} ({self.why})"

    @classmethod
    def of(cls, snapshot: Snapshot, awaits_look: bool) -> Safety:
        """Judge by the last look; where one is still to come since a bad check, nothing is safe."""
        found = snapshot.found_damage
        worst = None if found is None else found.worst
        if found is not None and worst is not None:
            counts = f"Inf {worst.inf_count}, NaN {worst.nan_count}"
            return cls(False, f"{WORDS[found.word]}: {counts} in {worst.layer_name}")
        if awaits_look:
            return cls(False, "a check was bad, and the model has not been seen intact since")
        if found is None:
            return cls(True, "no check has been bad since watching began")
        return cls(True, "intact at the last scan, and no check has been bad since")
