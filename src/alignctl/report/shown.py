"""How numbers are written for a reader."""

from __future__ import annotations

from alignctl.report.measures import Estimate

# From here on three decimals say nothing.
_LARGE = 100
_FORMS = {"share": "{:.1%}", "nats": "{:.3f}", "tokens": "{:,.1f}", "ratio": "{:.2f}×"}
_SIGNED = {"share": "{:+.1f} points", "nats": "{:+.3f}", "tokens": "{:+,.1f}", "ratio": "{:+.2f}"}


def value(found: float, unit: str) -> str:
    """A number in its unit."""
    return _FORMS.get(unit, "{:.3f}" if abs(found) < _LARGE else "{:,.4g}").format(found)


def estimate(found: Estimate | None, unit: str) -> str:
    """A number with its interval; a dash for none."""
    if found is None:
        return "–"
    spread = "" if found.interval is None else f" ({' to '.join(value(end, unit) for end in found.interval)})"
    return value(found.value, unit) + spread


def difference(found: Estimate | None, unit: str) -> str:
    """A difference with its sign and its interval; of shares in percentage points."""
    if found is None:
        return "–"
    scale = 100 if unit == "share" else 1
    form = _SIGNED.get(unit, "{:+.3f}" if abs(found.value) < _LARGE else "{:+,.4g}")
    out = form.format(scale * found.value)
    if found.interval is not None:
        low, high = (form.removesuffix(" points").format(scale * end) for end in found.interval)
        out += f" ({low} to {high})"
    return out if found.p is None else f"{out}, p = {found.p:.2g}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def moment(iso: str) -> str:
    """A moment of run.json, shorter."""
    return iso.replace("T", " ").removesuffix("+00:00")[:16] + (" UTC" if iso.endswith("+00:00") else "")
