"""One long run under load in which everything breaks that can, one thing after the other.

The model serves in a process of its own, four calls at a time, with a state folder. What must hold, whatever breaks: no
call raises, no answer differs beyond the tolerance, no plan and no more than the last second of counts is lost. Where
the pictures end, they begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offramp.model import BACKBONE
from replay.siege import CALLERS, LOST_S, Episode, Run

KILLS = 5  # in the middle of swaps
STEP = 50  # requests between two looks
MOST_COST = 1.03
BACK, AHEAD = -30.0, 400.0  # hours by which the clock jumps


# -- the episodes, in their order ------------------------------------------------------------------


def nothing(run: Run) -> None:
    run.load(run.episode("nothing yet"))


def nan_cache(run: Run) -> None:
    episode = run.episode("all caches lose their weights (NaN)")
    run.child.do("nan")
    run.load(episode)
    episode.checks["nothing is answered by them"] = set(episode.left) <= {BACKBONE}


def killed(run: Run) -> None:
    episode = run.episode("kill -9 while serving, and started again")
    before = run.report()
    run.killed_and_again(episode)
    run.load(episode)
    episode.checks["the same plan serves"] = run.began["plan"] == before["plan"]
    episode.checks["its caches answer again"] = set(episode.left) != {BACKBONE}


def missing_file(run: Run) -> None:
    _plan_damaged(run, "a plan's file is missing after kill -9", lambda file: file.unlink())


def cut_off_file(run: Run) -> None:
    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    _plan_damaged(run, "a plan's file is cut off after kill -9", cut)


def _plan_damaged(run: Run, name: str, damage: Callable[[Path], None]) -> None:
    """Weights of the plan that serves; then they are put back, and it goes on."""
    episode = run.episode(name)
    plan, kept = run.state / "plans", run.folder / "plans-kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(plan, kept)

    def break_it() -> None:
        for file in plan.rglob("*.safetensors"):
            damage(file)

    run.killed_and_again(episode, damage=break_it)
    run.load(episode)
    episode.notes.append(f"serves with {run.report()['rung']}")
    run.child.close()
    shutil.rmtree(plan)
    shutil.copytree(kept, plan)
    run.start()
    run.child.do("restore")
    run.load(episode)


def cut_off_state(run: Run) -> None:
    episode = run.episode("state.json is cut off after kill -9")
    file, kept = run.state / "state.json", run.folder / "state.json.kept"

    def cut() -> None:
        shutil.copy(file, kept)
        os.truncate(file, file.stat().st_size // 2)

    run.killed_and_again(episode, damage=cut)
    episode.checks["refused, with the reason"] = "ArtifactError" in run.began.get("error", "")
    shutil.copy(kept, file)
    run.start()
    run.load(episode)


def full_disk(run: Run) -> None:
    episode = run.episode("the disk is full, and a refit is asked for")
    run.child.do("disk", full=True)
    run.child.do("refresh", times=1)
    run.load(episode)
    written = (run.state / "state.json").stat().st_mtime_ns
    run.child.do("disk", full=False)
    run.load(episode)
    time.sleep(2 * LOST_S)
    episode.checks["counts are written again"] = (run.state / "state.json").stat().st_mtime_ns > written
    episode.checks["the state can be read"] = json.loads((run.state / "state.json").read_text())["plan"] >= 0


def two_refreshes(run: Run) -> None:
    episode = run.episode("eight refits asked for at once")
    before = _attempts(run)
    _idle(run, episode)
    begun = run.child.do("refresh", times=8)
    episode.checks["one begins"] = sum(begun) == 1
    _until(run, episode, lambda report: report["refresh"]["state"] == "fitting")
    episode.checks["one attempt more"] = _attempts(run) == before + 1


def killed_refit(run: Run) -> None:
    episode = run.episode("the refit's process is killed")
    _until(run, episode, lambda report: report["refresh"]["state"] == "fitting")
    plan = run.report()["plan"]
    episode.checks["there was one to kill"] = run.child.do("kill_refit")
    _until(run, episode, lambda report: not report["refresh"]["running"])
    last = run.report()["refresh"]["attempts"][-1]
    episode.notes.append(f"the attempt: {last['outcome']}")
    episode.checks["the attempt is over, the plan is the same"] = (
        last["outcome"] not in ("running", "taken into service") and run.report()["plan"] == plan
    )
    run.load(episode)


def killed_in_swaps(run: Run) -> None:
    episode = run.episode(f"kill -9 while plans are swapped, {KILLS} times")
    for _ in range(KILLS):
        run.child.do("swap_on")
        run.killed_and_again(episode)
        if "error" in run.began:
            episode.errors.append(run.began["error"])
            return
        run.child.do("restore")
        run.load(episode, run.options.episode // KILLS)
    run.child.do("first_plan")
    episode.checks["caches answer after each"] = sum(n for name, n in episode.left.items() if name != BACKBONE) > 0


def clock(run: Run) -> None:
    episode = run.episode(f"the clock jumps by {BACK:g} and {AHEAD:g} hours")
    for hours in (BACK, AHEAD, 0.0):
        run.child.do("clock", hours=hours)
        run.load(episode, run.options.episode // 3)


def flood(run: Run) -> None:
    episode = run.episode("a flood of requests that no cache answers, and calm after it")
    run.load(episode, run.options.flood, missing=True)
    during = run.report()
    run.load(episode, run.options.flood)
    after = run.report()
    cost = during["economy"]["mean_cost"]
    episode.notes.append(f"mean cost in the flood {cost:.3f}, {during['rung']}; then {after['rung']}")
    steps = [step["reason"] for step in after["steps"]]
    rested = any("cost more than they save" in reason for reason in steps)
    episode.checks["the cost is capped"] = rested or cost < MOST_COST
    episode.checks["caches answer afterwards"] = after["rung"] != "resting"


EPISODES: tuple[Callable[[Run], None], ...] = (
    nothing,
    nan_cache,
    killed,
    missing_file,
    cut_off_file,
    cut_off_state,
    full_disk,
    two_refreshes,
    killed_refit,
    killed_in_swaps,
    clock,
    flood,
)


def _attempts(run: Run) -> int:
    return len(run.report()["refresh"]["budget"]["spends"])


def _idle(run: Run, episode: Episode) -> None:
    _until(run, episode, lambda report: not report["refresh"]["running"])


def _until(run: Run, episode: Episode, there: Callable[[dict[str, Any]], bool]) -> None:
    """Load until the report says so. The check of the episode fails where it does not in time."""
    for _ in range(run.options.patience):
        if there(run.report()):
            return
        run.load(episode, STEP)
    episode.checks["in time"] = False


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        serving = Run(options, Path(folder))
        started = time.monotonic()
        try:
            for episode in EPISODES:
                episode(serving)
        finally:
            serving.child.close()
    rows = [episode.to_json(serving.tolerance) for episode in serving.episodes]
    return {
        "part": "faults",
        "note": f"{CALLERS} calls at a time; {100 * options.shadow:g} % of the requests are sampled.",
        "tolerance": serving.tolerance,
        "seconds": time.monotonic() - started,
        "rows": rows,
        "failed": [f"{row['fault']}: {name}" for row in rows for name, held in row["checks"].items() if not held],
    }


def table(document: dict[str, Any]) -> str:
    lines = ["| what breaks | requests | answered by caches | differ [p] | shown |", "|---" * 5 + "|"]
    for row in document["rows"]:
        shown = "; ".join(f"{name}{'' if held else ': **no**'}" for name, held in row["checks"].items())
        notes = f" ({'; '.join(row['notes'])})" if row["notes"] else ""
        lines.append(
            f"| {row['fault']} | {row['requests']:,} | {row['by_caches']:,} "
            f"| {row['disagreements']:,} [{row['p_value']:.2f}] | {shown}{notes} |"
        )
    failed = document["failed"]
    verdict = "All of it held." if not failed else f"Not shown: {'; '.join(failed)}."
    return "\n".join([*lines, "", f"Tolerance {100 * document['tolerance']:g} %. {verdict}"])


def quick(options: argparse.Namespace) -> None:
    options.method = "freeze"  # nothing to train
    options.parts, options.tolerance, options.fit_budget = (1500, 1500, 1600), 0.05, 150.0
    options.episode, options.flood, options.load, options.kill_after_s = 60, 700, 4000, 1.0
    options.shadow = 0.2
    options.policy = {"certify_rows": 200, "time_budget_s": 30.0, "method": "freeze"}
