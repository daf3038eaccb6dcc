"""The report of the self-check: what was compared, and which schedule is exact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Schedule = Literal["prefix", "all_positions"]
"""``"prefix"``: the input runs once, without autograd, and the queries continue it. ``"all_positions"``: input and queries run as
one sequence, with autograd, which costs more, and nothing can be kept."""


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Args:
        name: What it is.
        ok: Whether it holds.
        difference: What was measured, or None where the backbone raised an error.
        allowed: Most (or, where something must matter, least) that it may be.
        error: The error that the backbone raised.
    """

    name: str
    ok: bool
    difference: float | None
    allowed: float
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """What the self-check found; ``print`` shows it as a table.

    Args:
        model_type: The backbone's.
        dtype: The precision it was checked in.
        schedule: The fastest schedule that is exact, or None.
        reason: Why there is none: one sentence that starts with a verb.
        free_rows: Rows of the embedding table that no text uses: so many queries fit the adapter form.
        seconds: Time of the check.
        findings: What was compared.
    """

    model_type: str
    dtype: str
    schedule: Schedule | None
    reason: str | None
    free_rows: int
    seconds: float
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model_type} ({self.dtype}): " + (self.schedule or f"refused, because it {self.reason}")]
        for finding in self.findings:
            measured = finding.error or f"{finding.difference:.1e} (limit {finding.allowed:.1e})"
            lines.append(f"  {'ok  ' if finding.ok else 'FAIL'} {finding.name:<44} {measured}")
        return "\n".join([*lines, f"  {self.free_rows} free rows for queries; {self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def require(self) -> Schedule:
        """The schedule.

        Raises:
            ValueError: If none is exact.
        """
        if self.schedule is None:
            raise ValueError(
                f"Latent queries cannot work on this {self.model_type}: it {self.reason}. Use another backbone; "
                "slq_embed.backbone.check(model, processor) shows what was compared."
            )
        return self.schedule
