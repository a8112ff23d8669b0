"""What was planned, as run.json holds it, and what is said when it was not enough, or not right."""

from __future__ import annotations

from typing import Any

from alignctl.plan.estimate import Plan
from alignctl.plan.memory import GIB

# Of the plan from what was measured, on a GPU.
OFF = 0.10
_SHOWN = 6
# Where there is no plan: an architecture whose config cannot be read as a shape.
GENERAL = (
    "in order of least harm: training.gradient_checkpointing=true, a smaller training.per_device_train_batch_size "
    "with more gradient_accumulation_steps, a `quantization:` section, a smaller data.max_length"
)


def record(plan: Plan) -> dict[str, Any]:
    """`memory` in run.json: the planned peak and its lines, and every change that would lower it, with the new peak."""
    return {
        "planned_gib": round(plan.memory.allocated / GIB, 3),
        "measured_gib": None,
        "phase": plan.memory.phase,
        "lines": [vars(line) for line in plan.memory.lines],
        "changes": [{"keys": str(fix), "needed_gib": round(fix.needed / GIB, 2)} for fix in plan.fixes(0)[:_SHOWN]],
        "needed_gib": round(plan.memory.needed / GIB, 2),
    }


def shortage(memory: dict[str, Any], peak: float) -> tuple[str, str]:
    """Peak and plan, and the keys to change in order of least harm, with what is needed then."""
    if not memory:
        return f"peak {peak:.2f} GiB", GENERAL
    said = f"peak {peak:.2f} GiB, and {memory['planned_gib']:.2f} were planned"
    changes = [f"{each['keys']} ({each['needed_gib']:.1f} GiB)" for each in memory["changes"]]
    now = f"in order of least harm, each on top of those before it, from {memory['needed_gib']:.1f} GiB now"
    return said, f"{now}: {'; '.join(changes)}" if changes else "a smaller model, or more memory"


def missed(memory: dict[str, Any]) -> str:
    """What is to be said when plan and measured peak are far apart; empty when they are not."""
    planned, measured = memory["planned_gib"], memory["measured_gib"]
    apart = planned / measured - 1
    if abs(apart) <= OFF:
        return ""
    return (
        f"memory was planned {'too high' if apart > 0 else 'too low'} by {abs(apart):.0%}: "
        f"{planned:.2f} GiB, and {measured:.2f} measured; run.json has the lines"
    )
