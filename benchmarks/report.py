"""What a benchmark says: a table, the figures that matter, JSON, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from madkernels.benchmarks.baseline import Baseline
from madkernels.benchmarks.cases import describe
from madkernels.benchmarks.harness import OURS, Measured, Result
from madkernels.reporting.figures import COLOURS, GREY, Panel, picture
from madkernels.reporting.tables import Table

SCHEMA = 1
MIB = 1 << 20


def ours(measured: Measured, dtype: str, direction: str) -> Result | None:
    """The op's own timing, if it has one."""
    for result in measured.results:
        if (result.contender, result.dtype, result.direction) == (OURS, dtype, direction) and result.seconds:
            return result
    return None


def figures(measured: Measured) -> dict[str, dict[str, Any]]:
    """The figures that matter, by dtype and pass.

    `times_as_long`: the time of each peer over that of the op. `fastest_peer`: the first of them. `of_floor`: the floor over
    the time of the op; `floor_seconds` its parts. `times_forward`: backward over forward. `peak_memory`: peak bytes of a
    forward and backward over the bytes of the inputs and the output. `times_float32`: the time over that of float32. Of an
    op of products, `operations`: those that the pass cannot do without; `operations_per_second`; `of_multiply`: that over
    the rate at which the machine multiplies.
    """
    found: dict[str, dict[str, Any]] = {}
    for dtype, passes in measured.traffic.items():
        found[dtype] = {}
        for direction in passes:
            if mine := ours(measured, dtype, direction):
                found[dtype][direction] = _of_pass(measured, mine)
        if dtype in measured.memory:
            found[dtype]["peak_memory"] = measured.memory[dtype] / passes["forward"]
    return found


def _of_pass(measured: Measured, mine: Result) -> dict[str, Any]:
    dtype, direction = mine.dtype, mine.direction
    peers = [r for r in measured.results if (r.dtype, r.direction) == (dtype, direction) and r.seconds and r is not mine]
    peers.sort(key=lambda r: r.median)
    floor = measured.floor(dtype, direction)
    found: dict[str, Any] = {
        "seconds": mine.median,
        "floor_seconds": floor,
        "of_floor": max(floor.values()) / mine.median,
        "times_as_long": {peer.contender: peer.median / mine.median for peer in peers},
        "fastest_peer": peers[0].contender if peers else None,
    }
    if operations := measured.case.flops(direction):
        found |= {"operations": operations, "operations_per_second": operations / mine.median}
        found["of_multiply"] = floor["multiply"] / mine.median
    forward, single = ours(measured, dtype, "forward"), ours(measured, "float32", direction)
    if direction == "backward" and forward:
        found["times_forward"] = mine.median / forward.median
    if dtype != "float32" and single:
        found["times_float32"] = mine.median / single.median
    return found


def show(measured: Measured, console: Console, baseline: Baseline | None = None) -> None:
    """Prints the table of a case and its figures."""
    copies = ", ".join(f"{count} of {dtype}" for dtype, count in measured.copies.items())
    cold = "not found in cache" if measured.cold else "still in the last-level cache"
    console.print(f"\n[bold]{measured.op}[/bold] {measured.case}", highlight=False)
    console.print(f"checked: {measured.checked}; copies of the inputs: {copies}, {cold}", highlight=False)
    if measured.case.formula:
        console.print(f"operations: {measured.case.formula}", highlight=False)
    for dtype, passes in measured.traffic.items():
        for direction in passes:
            results = [r for r in measured.results if (r.dtype, r.direction) == (dtype, direction)]
            _show_pass(measured, results, console, baseline)
    for name, why in measured.absent.items():
        console.print(f"not run: {name}: {why}", highlight=False)
    for line in _summary(measured):
        console.print(line, highlight=False)


def _show_pass(measured: Measured, results: Sequence[Result], console: Console, baseline: Baseline | None) -> None:
    if not results:
        return
    case, direction = measured.case, results[0].direction
    columns = ["contender", "error", "median", "min", "quartiles", "/ ours", "floor"]
    columns += ["GFLOP/s", case.share] if case.flops(direction) else []
    columns += ["tokens/s"] if case.tells_tokens else []
    columns += ["peak MiB"] if case.tells_memory else []
    columns += ["/ baseline"] if baseline else []
    table = Table(*columns, spare=("quartiles", "min"), box=None, title_justify="left")
    table.title = f"{results[0].dtype} {_called(measured, direction)}, in ms"
    table.columns[0].no_wrap = True
    for result in results:
        row = _row(measured, result)
        table.add_row(*row, *([_against(measured, result, baseline)] if baseline and result.seconds else []))
    table.show(console)


def _called(measured: Measured, direction: str) -> str:
    return measured.case.called.get(direction, direction)


def _against(measured: Measured, result: Result, baseline: Baseline) -> str:
    """The time over that of the baseline, if it has one; marked where the quartiles lie apart."""
    if (spread := baseline.of(measured, result)) is None:
        return ""
    low, median, high = result.quartiles
    mark = " slower" if low > spread[2] else " faster" if high < spread[0] else ""
    return f"{median / spread[1]:.2f}{mark}"


def overview(cases: Sequence[Measured], console: Console, baseline: Baseline | None = None) -> None:
    """Prints one table of all cases: a row for each dtype and pass."""
    columns = ["", "case", "dtype", "pass", "ms", "floor", "FLOP/byte", "GFLOP/s"]
    tells_tokens, tells_memory = any(m.case.tells_tokens for m in cases), any(m.case.tells_memory for m in cases)
    columns += ["tokens/s"] if tells_tokens else []
    columns += ["peak MiB"] if tells_memory else []
    columns += ["/ baseline"] if baseline else []
    table = Table(*columns, "peers, / ours", "skipped", title="All cases", title_justify="left", box=None)
    for measured in cases:
        for result in (r for r in measured.results if r.contender == OURS):
            row = _overview_row(measured, result)
            row += [_tokens(measured, result)] if tells_tokens else []
            row += [_memory(result)] if tells_memory else []
            row += [_against(measured, result, baseline) if result.seconds else ""] if baseline else []
            table.add_row(*row, *_peers_of(measured, result))
    table.show(console)


def _overview_row(measured: Measured, result: Result) -> list[str]:
    row = [measured.op, measured.case.name, result.dtype, _called(measured, result.direction)]
    if not result.seconds:
        return [*row, f"wrong: {result.error:.1e}", "", "", ""]
    floor = max(measured.floor(result.dtype, result.direction).values()) / result.median
    rate = measured.case.arithmetic(result.direction) / result.median / 1e9
    intensity = measured.intensity(result.dtype, result.direction)
    return [*row, milliseconds(result.median), f"{floor:.1%}", f"{intensity:.3g}", f"{rate:.3g}" if rate else ""]


def _peers_of(measured: Measured, mine: Result) -> list[str]:
    """The peers of a pass with their times over ours, and those that were skipped."""
    kind = mine.dtype, mine.direction
    peers = [r for r in measured.results if (r.dtype, r.direction) == kind and r is not mine and r.seconds]
    times = [f"{r.contender} {r.median / mine.median:.2f}" for r in peers] if mine.seconds else []
    skipped = [f"{name} {why.partition(': ')[2]}" for name, why in measured.absent.items() if why.startswith("skipped")]
    return [", ".join(times), ", ".join(skipped)]


def _tokens(measured: Measured, result: Result) -> str:
    return f"{measured.case.tokens / result.median:.4g}" if measured.case.tells_tokens and result.seconds else ""


def _memory(result: Result) -> str:
    return f"{result.memory / MIB:.1f}" if result.memory else ""


def _row(measured: Measured, result: Result) -> list[str]:
    row = [result.contender, f"{result.error:.1e}"]
    if not result.right:
        return [*row, "wrong", "not", "timed"]
    low, _, high = result.quartiles
    row += [milliseconds(result.median), milliseconds(min(result.seconds)), f"{milliseconds(low)} - {milliseconds(high)}"]
    mine = ours(measured, result.dtype, result.direction)
    row.append(f"{result.median / mine.median:.2f}" if mine else "")
    floor = measured.floor(result.dtype, result.direction)
    row.append(f"{max(floor.values()) / result.median:.1%}")
    if operations := measured.case.flops(result.direction):
        row += [f"{operations / result.median / 1e9:.4g}", f"{floor['multiply'] / result.median:.1%}"]
    row += [_tokens(measured, result)] if measured.case.tells_tokens else []
    return row + ([_memory(result)] if measured.case.tells_memory else [])


def _summary(measured: Measured) -> list[str]:
    lines = []
    for dtype, found in figures(measured).items():
        for direction in ("forward", "backward"):
            if direction in found:
                lines.append(f"{dtype} {_called(measured, direction)}: {_sentence(found[direction])}")
        if "peak_memory" in found:
            times = f"{found['peak_memory']:.2f} times inputs and output"
            sizes = f"{measured.memory[dtype] / MIB:.1f} of {measured.traffic[dtype]['forward'] / MIB:.1f} MiB"
            lines.append(f"{dtype} peak memory of forward and backward: {times} ({sizes})")
    exp2, copy = statistics.median(measured.rates.exp2), statistics.median(measured.rates.copy)
    lines.append(f"floor from {exp2 / 1e9:.2f} G exp2/s and {copy / 1e9:.2f} GB/s of copying, measured between the runs")
    products = any(measured.case.flops(result.direction) for result in measured.results)
    for dtype, rates in measured.rates.multiply.items() if products else ():
        low, high = speed(min(rates)), speed(max(rates))  # far apart where others used the machine
        lines.append(f"multiplying {dtype}: {speed(statistics.median(rates))}, from {low} to {high} between the runs")
    return lines + _gpu_lines(measured.rates.states)


def _gpu_lines(states: Sequence[dict[str, Any]]) -> list[str]:
    """What the GPU's clocks and power did during the runs."""
    if failures := {state["failure"] for state in states if "failure" in state}:
        return [f"GPU clocks and power are not known: {', '.join(failures)}"]
    if not states:
        return []
    ranges = {key: [state[key] for state in states] for key in ("sm_clock_mhz", "memory_clock_mhz", "power_w")}
    clock, memory, power = (f"{min(values):.0f} to {max(values):.0f}" for values in ranges.values())
    slowdowns = sorted({name for state in states for name in state["slowdowns"]})
    return [f"GPU clock {clock} MHz, memory {memory} MHz, {power} W, slowed down by: {', '.join(slowdowns) or 'nothing'}"]


def _sentence(found: dict[str, Any]) -> str:
    parts = [f"{found['of_floor']:.1%} of the floor"]
    if "of_multiply" in found:
        parts.append(f"{speed(found['operations_per_second'])}, {found['of_multiply']:.1%} of the rate of multiplying")
    if "times_forward" in found:
        parts.append(f"{found['times_forward']:.2f} times the forward")
    if "times_float32" in found:
        parts.append(f"{found['times_float32']:.2f} times float32")
    if found["fastest_peer"]:
        name = found["fastest_peer"]
        parts.append(f"the fastest peer, {name}, takes {found['times_as_long'][name]:.2f} times as long")
    return "; ".join(parts)


def milliseconds(seconds: float) -> str:
    """A number of milliseconds, with three digits or more."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def speed(operations: float) -> str:
    """Operations per second, with three digits or more."""
    return f"{operations / 1e12:.4g} TFLOP/s" if operations >= 1e12 else f"{operations / 1e9:.3g} GFLOP/s"


def record(machine: dict[str, str], cases: Sequence[Measured]) -> dict[str, Any]:
    """All that was measured, as it stands in a JSON file.

    Keys: `schema` (1); `op`, of several all names; `machine` (text by name); `cases`, each with `op` (or layer, or model),
    `case` (its fields), `checked`, `copies`, `cold`, `absent` (reasons by peer), `results` (`contender`, `dtype`,
    `direction`, `error`, `tolerance`, `seconds` of each run, `memory` in bytes, of layers and models, and `median`,
    `minimum`, `lower_quartile`, `upper_quartile` where there are any), `arithmetic` (operations by pass), `traffic_bytes`,
    `peak_memory_bytes`, `rates` (`exp2_per_second`, `copy_bytes_per_second`, and by dtype `multiply_per_second`, the
    operations of products; every measurement), `gpu_states` (clocks, power and slowdowns at each of them; empty on a CPU)
    and `figures` (see :func:`figures`).
    """
    op = ", ".join(dict.fromkeys(m.op for m in cases))
    return {"schema": SCHEMA, "op": op, "machine": machine, "cases": [_record(m) for m in cases]}


def write_json(path: Path, measured: dict[str, Any]) -> None:
    """Writes a :func:`record`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n")


def _record(measured: Measured) -> dict[str, Any]:
    results = []
    for result in measured.results:
        record = asdict(result)
        if result.seconds:
            low, median, high = result.quartiles
            record |= {"median": median, "minimum": min(result.seconds), "lower_quartile": low, "upper_quartile": high}
        results.append(record)
    return {
        "op": measured.op,
        "case": asdict(measured.case),
        "checked": measured.checked,
        "copies": measured.copies,
        "cold": measured.cold,
        "absent": measured.absent,
        "results": results,
        "arithmetic": {r.direction: measured.case.arithmetic(r.direction) for r in measured.results},
        "traffic_bytes": measured.traffic,
        "peak_memory_bytes": measured.memory,
        "rates": {
            "exp2_per_second": measured.rates.exp2,
            "copy_bytes_per_second": measured.rates.copy,
            "multiply_per_second": measured.rates.multiply,
        },
        "gpu_states": measured.rates.states,
        "figures": figures(measured),
    }


def plot(path: Path, measured: dict[str, Any]) -> None:
    """Draws a :func:`record`: a roofline of all cases for each dtype; the median of every contender, with its quartiles, in
    a panel for each case, dtype and pass."""
    panels = [Panel(f"Roofline, {dtype}", partial(_draw_roofline, cases=cases)) for dtype, cases in _by_dtype(measured)]
    legend = _colours(measured)
    for case in measured["cases"]:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for result in case["results"]:
            if result["seconds"]:
                groups.setdefault((result["dtype"], result["direction"]), []).append(result)
        for names, results in groups.items():
            title = f"{case['op']}, {describe(case['case'])}; {' '.join(names)}"
            panels.append(Panel(title, partial(_draw_times, results=results)))
    machine = measured["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    title = f"{measured['op']} on {where}, torch {machine['torch']}: ms, median and quartiles"
    try:
        picture(path, panels, legend, title=title, columns=min(len(panels), 2))
    except ValueError as error:  # an unknown suffix; matplotlib's text lists the known ones
        raise ValueError(f"--plot {path}: {error}") from None


def _draw_times(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    medians = [1e3 * r["median"] for r in results]
    spread = [[1e3 * abs(r[end] - r["median"]) for r in results] for end in ("lower_quartile", "upper_quartile")]
    colours = [COLOURS[1] if r["contender"] == OURS else COLOURS[0] for r in results]
    bars = axes.barh(range(len(results)), medians, xerr=spread, color=colours, ecolor=GREY)
    axes.bar_label(bars, [milliseconds(r["median"]) for r in results], padding=3)
    axes.set_yticks(range(len(results)), [r["contender"] for r in results])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _colours(measured: dict[str, Any]) -> dict[str, str]:
    """The colours of ops in a roofline; the eighth is that of all others."""
    ops = list(dict.fromkeys(case["op"] for case in measured["cases"]))
    return {op: COLOURS[min(number, len(COLOURS) - 1)] for number, op in enumerate(ops)}


def _by_dtype(measured: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What a roofline needs of ours, by dtype: a point for each pass that has arithmetic."""
    colours, found = _colours(measured), dict[str, list[dict[str, Any]]]()
    for case in measured["cases"]:
        for r in case["results"]:
            operations = case["arithmetic"][r["direction"]]
            if r["contender"] == OURS and r["seconds"] and operations:
                rates = case["rates"]
                found.setdefault(r["dtype"], []).append({
                    "intensity": operations / case["traffic_bytes"][r["dtype"]][r["direction"]],
                    "rate": operations / r["median"] / 1e9,
                    "copy": statistics.median(rates["copy_bytes_per_second"]) / 1e9,
                    "multiply": statistics.median(rates["multiply_per_second"][r["dtype"]]) / 1e9,
                    "colour": colours[case["op"]],
                    "marker": "o" if r["direction"] == "forward" else "s",
                })  # fmt: skip
    return list(found.items())


def _draw_roofline(axes: Axes, cases: Sequence[dict[str, Any]]) -> None:
    """Rates over intensity, forward round and backward square, under what copying and multiplying allow."""
    copy, multiply = (statistics.median(case[rate] for case in cases) for rate in ("copy", "multiply"))
    ridge = multiply / copy
    ends = min(ridge, *(case["intensity"] for case in cases)) / 2, max(ridge, *(case["intensity"] for case in cases)) * 2
    axes.plot([ends[0], ridge, ends[1]], [copy * ends[0], multiply, multiply], color=GREY)
    for case in cases:
        axes.plot(case["intensity"], case["rate"], color=case["colour"], marker=case["marker"], linestyle="")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"FLOP per byte; roof: {copy:.3g} GB/s, {multiply:.4g} GFLOP/s")
    axes.set_ylabel("GFLOP/s")
