"""From figures to a table, and a plot where matplotlib is installed (`pip install streamfs[bench]`)."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.cases import Case, Goal

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Outcome:
    """`rounds`: the figure of every contender in each round. `problem`: why there are none."""

    case: Case
    rounds: list[dict[str, float]]
    problem: str | None = None

    def median(self, name: str) -> float | None:
        figures = [one[name] for one in self.rounds if name in one]
        return statistics.median(figures) if figures else None

    def ratio(self, goal: Goal) -> float | None:
        """The median of what each round says: contenders of a round met the same noise."""
        ratios = [one["streamfs"] / one[goal.peer] for one in self.rounds if goal.peer in one and "streamfs" in one]
        return statistics.median(ratios) if ratios else None

    def met(self, goal: Goal) -> bool | None:
        ratio = self.ratio(goal)
        if ratio is None:
            return None
        return ratio >= goal.factor if self.case.more_is_better else ratio <= goal.factor


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| work | streamfs | others | ratio | goal | |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        case = outcome.case
        sign = "≥" if case.more_is_better else "≤"
        if outcome.problem is not None:
            lines.append(f"| {case.title} | {outcome.problem} | | | | **failed** |")
            continue
        own = f"{_number(outcome.median('streamfs'))} {case.unit}"
        names = list(dict.fromkeys(name for one in outcome.rounds for name in one if name != "streamfs"))
        others = ", ".join(f"{name} {_number(outcome.median(name))}" for name in names)
        for index, goal in enumerate(case.goals):
            ratio, met = outcome.ratio(goal), outcome.met(goal)
            verdict = {True: "met", False: "**not met**", None: "not measured"}[met]
            first = (case.title, own, others) if index == 0 else ("", "", "")
            shown = "-" if ratio is None else f"{ratio:.2f} of {goal.peer}"
            lines.append(f"| {' | '.join(first)} | {shown} | {sign} {goal.factor:g} | {verdict} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def section(outcomes: Sequence[Outcome], size: int, rounds: int, missing: dict[str, str], load: str, plot: bool) -> str:
    goals = [(o, g) for o in outcomes for g in o.case.goals]
    met = sum(o.met(g) is True for o, g in goals)
    text = [
        f"{met} of {len(goals)} ratios are met. A file of {size >> 20} MiB in memory, {rounds} rounds, medians; the "
        f"ratio is the median of the ratios of each round. Python {platform.python_version()}, Linux "
        f"{platform.release()}; load averages at the start and at the end: {load}.",
        "",
        *([] if not plot else ["![ratios to the goals](performance.png)", ""]),
        table(outcomes),
    ]
    if missing:
        text += ["", "Not measured: " + "; ".join(sorted(missing.values())) + "."]
    return "\n".join(text)


def write(page: Path, text: str) -> None:
    """Put `text` between the marks of the page; the rest of it stays."""
    old = page.read_text() if page.exists() else f"# Performance\n\n## Against others\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        old += f"\n## Against others\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(outcomes: Sequence[Outcome], path: Path) -> bool:
    """How each ratio stands to its goal: right of 1 is met. False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    bars = []
    for outcome in outcomes:
        for goal in outcome.case.goals:
            ratio = outcome.ratio(goal)
            if ratio is not None and ratio > 0:
                score = ratio / goal.factor if outcome.case.more_is_better else goal.factor / ratio
                bars.append((f"{outcome.case.key} : {goal.peer}", score))
    bars.reverse()
    figure, axes = pyplot.subplots(figsize=(9, 0.26 * len(bars) + 1.2))
    axes.barh([b[0] for b in bars], [b[1] for b in bars], color=["#2a7f62" if b[1] >= 1 else "#c0504d" for b in bars])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("ratio reached / ratio wanted (right of the line: met)")
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
