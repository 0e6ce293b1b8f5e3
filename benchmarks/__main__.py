"""`python -m benchmarks`: install what is needed, measure every contender in turn, write tables and plot."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import plan
from .contenders import CONTENDERS, available
from .needs import Missing, Tools, machine, prepare, versions
from .report import Results, document, has_curves, summary
from .runs import Sample, Scenario, run

HERE = Path(__file__).parent
MODES = {"quick": (plan.quick, 2), "curves": (plan.curves, 2), "full": (plan.full, 3), "smoke": (plan.smoke, 1)}
MARKS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")


def main() -> int:
    options = _arguments()
    if options.render is not None:
        results: Results = json.loads(options.render.read_text())
        _write(results, options.out)
        print(document(results))
        if options.publish:
            _publish(results, options.out)
        return 0
    try:
        tools = prepare(options.out, install=not options.no_install)
    except Missing as error:
        print(f"Cannot run: {error}", file=sys.stderr)
        return 2
    for what, consequence in tools.missing.items():
        print(f"MISSING {what}: {consequence}", file=sys.stderr)
    mode = next((name for name in MODES if getattr(options, name)), "quick")
    make, rounds = MODES[mode]
    scenarios = make()
    if options.only:
        scenarios = [scenario for scenario in scenarios if scenario.key in options.only]
    rounds = options.rounds or rounds
    started, clock = datetime.now(UTC), time.monotonic()
    samples = _measure(scenarios, tools, rounds, options.contenders)
    results = {
        "mode": mode,
        "started": f"{started:%Y-%m-%d %H:%M} UTC",
        "seconds": round(time.monotonic() - clock),
        "rounds": rounds,
        "machine": machine(),
        "versions": versions(tools),
        "missing": tools.missing,
        "scenarios": {scenario.key: scenario.title for scenario in scenarios},
        "samples": samples,
    }
    _write(results, options.out)
    print(f"\n{document(results)}\nWritten: {options.out}/results.json, report.md, plot.png")
    if options.publish:
        _publish(results, options.out)
    return 0


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="the table, two rounds, about ten minutes (default)")
    mode.add_argument(
        "--curves", action="store_true", help="the table and the plot's curves, a quarter of an hour a round"
    )
    mode.add_argument("--full", action="store_true", help="every point of the plot, three rounds, about two hours")
    mode.add_argument("--smoke", action="store_true", help="seconds; shows that everything works, nothing else")
    parser.add_argument("--rounds", type=int, help="how often each contender gets its turn")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="these scenarios, such as fanout-1000x5 connect")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="these contenders")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where results, report and plot go")
    parser.add_argument("--no-install", action="store_true", help="use what is there")
    parser.add_argument("--publish", action="store_true", help="also into benchmarks/, docs/ and the README's tables")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: report and plot from results")
    return parser.parse_args()


def _measure(scenarios: list[Scenario], tools: Tools, rounds: int, wanted: list[str] | None) -> list[Sample]:
    """Every contender of a scenario in turn, and that again for each round."""
    contenders = available(tools)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="sse-trio-bench-") as directory:
        Path(directory).chmod(0o755)  # nginx's worker is another user
        for scenario in scenarios:
            keys = [key for key in scenario.contenders if key in contenders and (not wanted or key in wanted)]
            for turn in range(rounds):
                for key in keys:
                    place = Path(directory) / f"{scenario.key}-{key}-{turn}"
                    sample = {"round": turn} | run(scenario, contenders[key], tools, place)
                    samples.append(sample)
                    print(_line(sample), flush=True)
                    shutil.rmtree(place, ignore_errors=True)
    return samples


def _line(sample: Sample) -> str:
    """One run on one line, while one waits."""
    name = f"{sample['scenario']:20} {sample['contender']:13}"
    if "error" in sample:
        return f"{name} FAILED {sample['error'].strip().splitlines()[-1][:160]}"
    text = f"{name} {sample['ready']} in {sample['connect_seconds']:.2f} s"
    text += f", {sample['rss_per_client_kb']:.1f} KB each"
    if sample["failures"]:
        text += f", failed {sample['failures']}"
    if "share" in sample:
        cpu = sample["cpu_us_per_delivery"]
        done = sample["done"]
        text += f"; {sample['share']:.2%} (sent {done['sent']}, lost {done['lost']})"
        text += f", {sample['deliveries_per_s']:,.0f}/s, p50 {sample['p50_ms']:.2f} ms"
        text += f", p99 {sample['p99_ms']:.2f} ms" + (f", {cpu:.2f} µs each" if cpu is not None else "")
        if sample["wrong"]:
            text += f", {sample['wrong']} doubled, out of order or foreign"
    if "probe_ms" in sample:
        text += f"; health p99 {sample['probe_ms']['p99']:.1f} max {sample['probe_ms']['max']:.1f} ms"
        text += f", {sample['probe_failed']} failed" if sample["probe_failed"] else ""
    if "longest_turn_ms" in sample:
        text += f", longest turn of the loop {sample['longest_turn_ms']:.1f} ms"
    return text


def _write(results: Results, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text(document(results))
    if "matplotlib" not in results["missing"]:
        from .plot import draw

        draw(results, out / "plot.png")


def _publish(results: Results, out: Path) -> None:
    """Into the repository: the numbers, the plot, and the tables between the marks of the two READMEs."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if has_curves(results):
        shutil.copy(out / "plot.png", HERE / "plot.png")
    for readme, tables in ((HERE / "README.md", document(results)), (HERE.parent / "README.md", summary(results))):
        text = readme.read_text()
        begin, middle, rest = text.partition(MARKS[0])
        _, end, rest = rest.partition(MARKS[1])
        if middle and end:
            readme.write_text(f"{begin}{MARKS[0]}\n{tables}{MARKS[1]}{rest}")


if __name__ == "__main__":
    sys.exit(main())
