"""Small SVG pictures for the report: intervals of the rungs, and the loss curves with the kept step."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from heldout.pipeline.ladder import Rung
from heldout.pipeline.training import CurvePoint

#: Narrow, so that the words are still read when the picture is as wide as a phone.
WIDTH = 560
INK, FAINT, GREEN, BLUE, ORANGE = "#1c2530", "#d5dbe1", "#1a7f4b", "#2f6fb7", "#c2570c"


def intervals(rungs: Sequence[Rung]) -> str:
    """One line per rung: its score and 95 % interval on a common axis from 0 to 100 %."""
    left, right, row = 110, WIDTH - 56, 30
    height = row * len(rungs) + 34

    def x(share: float) -> float:
        return left + share * (right - left)

    parts = [
        f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{height - 26}" stroke="{FAINT}"/>'
        f'<text x="{x(t):.1f}" y="{height - 8}" text-anchor="middle" fill="#5b6673">{t:.0%}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    for i, rung in enumerate(rungs):
        y = row * i + 20
        colour = GREEN if rung.kind == "tuned" else BLUE
        low, high = rung.scores.interval
        parts.append(
            f'<text x="{left - 12}" y="{y + 5}" text-anchor="end" fill="{INK}">{html.escape(rung.name)}</text>'
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
            f'<circle cx="{x(rung.scores.mean):.1f}" cy="{y}" r="5" fill="{colour}"/>'
            f'<text x="{right + 54}" y="{y + 5}" text-anchor="end" fill="{INK}">{rung.scores.mean:.1%}</text>'
        )
    return _svg(height, parts)


def losses(curve: Sequence[CurvePoint], best_step: int, planned: int) -> str:
    """Training and validation loss over steps on a logarithmic axis, validation also calibrated, with the step
    that was kept and, if it came before the planned last one, the step at which training stopped."""
    left, right, top, bottom = 50, WIDTH - 10, 4, 260
    highest = top + 40  # above it stand the names of steps
    valid = [(p.step, p.valid_loss) for p in curve if p.valid_loss is not None]
    calibrated = [(p.step, p.valid_calibrated_loss) for p in curve if p.valid_calibrated_loss is not None]
    train = _smooth([(p.step, p.train_loss) for p in curve])
    values = [max(v, 1e-6) for _, v in (*valid, *calibrated, *train)]
    low, high = math.log10(min(values)), math.log10(max(values))
    high = high if high - low > 0.1 else low + 0.1
    ended = curve[-1].step
    last = max(1, ended, planned)

    def at(step: int, value: float) -> tuple[float, float]:
        share = (math.log10(max(value, 1e-6)) - low) / (high - low)
        return left + step / last * (right - left), bottom - share * (bottom - highest)

    ticks = [10**e * m for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    parts = []
    for tick in ticks:
        if low <= math.log10(tick) <= high:
            y = at(0, tick)[1]
            parts.append(
                f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>'
                f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6673">{tick:g}</text>'
            )
    kept = at(best_step, values[0])[0]
    stop = at(ended, values[0])[0]
    beyond = stop - kept < 110 and kept - left > 110  # its label would lie across the line where training stopped
    anchor, shift = ("end", -6) if beyond or kept > (left + right) / 2 else ("start", 6)
    parts += [
        f'<line x1="{kept:.1f}" x2="{kept:.1f}" y1="{top}" y2="{bottom}" stroke="{GREEN}" stroke-dasharray="5 4"/>',
        *(_stop(stop, right, top, bottom, ended, planned) if ended < planned else ()),
        _line([at(*point) for point in train], BLUE),
        _line([at(*point) for point in valid], ORANGE, dashed=True),
        _line([at(*point) for point in calibrated], ORANGE),
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ORANGE}"/>' for x, y in (at(*p) for p in calibrated)),
        f'<text x="{kept + shift:.1f}" y="{top + 12}" text-anchor="{anchor}" fill="{GREEN}">'
        f"kept: step {best_step}</text>",
        f'<text x="{left}" y="{bottom + 26}" fill="{BLUE}">training loss (mean of 5 steps)</text>',
        f'<text x="{left}" y="{bottom + 44}" fill="{ORANGE}">validation loss: - - as it is, — calibrated</text>'
        if valid
        else "",
        f'<text x="{right}" y="{bottom + 26}" text-anchor="end" fill="#5b6673">{last} steps'
        f"{' planned' if ended < planned else ''}</text>",
    ]
    return _svg(bottom + 54, parts)


def _stop(x: float, right: float, top: float, bottom: float, ended: int, planned: int) -> list[str]:
    """What was not trained, and where training stopped."""
    # Beside the line, or under the label of the kept step where there is no room.
    anchor, shift = ("start", 6) if right - x > 130 else ("end", -6)
    return [
        f'<rect x="{x:.1f}" y="{top}" width="{right - x:.1f}" height="{bottom - top}" fill="{FAINT}" opacity="0.35"/>',
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{INK}"/>',
        f'<text x="{x + shift:.1f}" y="{top + 30}" text-anchor="{anchor}" fill="{INK}">stopped: step {ended}</text>',
    ]


def _smooth(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    smooth = []
    for i in range(len(points)):
        near = [value for _, value in points[max(0, i - window + 1) : i + 1]]
        smooth.append((points[i][0], sum(near) / len(near)))
    return smooth


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="4 4" opacity="0.7"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif" font-size="13" role="img">'
        f"{''.join(parts)}</svg>"
    )
