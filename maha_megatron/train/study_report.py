"""The tables of a study, from what its runs left on disk."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from maha_megatron.config import accounting
from maha_megatron.config.load import config_to_dict
from maha_megatron.train.result_files import markdown_table
from maha_megatron.train.seed_noise import Compared, compared
from maha_megatron.train.study_runs import Stage, StudyRun
from maha_megatron.train.trials import column
from maha_megatron.units import format_count, format_duration

NEAR_TOKENS = 128
"""Positions below are one bin of the table; beyond, the evaluation's powers of two."""
NOTHING = "-"
_ASKED_NOISE = "All runs have the same questions; noise is what other seeds, not other questions, do to a difference to"
HEADER = (
    "peer", "seeds", "validation loss", "spread", "difference", "noise", "tokens/s (beside)", "wall clock",
    "attention MFLOP a token", "saved", "parameters",
)  # fmt: skip

Values = dict[str, dict[int, float]]
"""Peer -> seed -> what was measured."""


def study_text(runs: Sequence[StudyRun], reference: str) -> str:
    """All tables, as Markdown; of runs that are not trained only that they are not."""
    trained = [run for run in runs if run.is_trained]
    parts = [_main_text(trained, reference)] if trained else []
    found = {run.title: record for run in trained if (record := run.found())}
    for make in (_position_text, _needle_text, _pairs_text):
        parts += filter(None, [make([run for run in trained if run.title in found], found, reference)])
    missing = [
        f"{run.title} ({run.steps_done()} of {run.config.train.steps} steps)" for run in runs if run not in trained
    ]
    if missing:
        parts.append(f"Not trained to the end: {', '.join(missing)}.")
    if missing := [run.title for run in runs if run.stage is Stage.EVALUATE]:
        parts.append(f"Trained, but not evaluated: {', '.join(missing)}.")
    return "\n\n".join(parts)


def study_data(runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Every run's configuration, metrics, sessions and evaluation, as plain data."""
    return {
        run.title: {
            "peer": run.peer,
            "seed": run.seed,
            "trained": run.is_trained,
            "config": config_to_dict(run.config),
            "rows": run.rows(),
            "sessions": [asdict(session) for session in run.sessions()],
            "evaluation": run.found() if run.is_trained else None,
        }
        for run in runs
    }


# ---------------------------------------------------------------------------------------------------------- training


def _main_text(runs: Sequence[StudyRun], reference: str) -> str:
    losses = compared(_values(runs, StudyRun.validation_loss), reference)
    table = []
    for peer, some in _by_peer(runs).items():
        config, loss = some[0].config, losses[peer]
        sessions = [run.sessions() for run in some]
        steady = [statistics.median(_speeds(run)) for run in some]
        seconds = [sum(session.seconds for session in of_run) for of_run in sessions]
        table.append([
            peer,
            " ".join(str(run.seed) for run in some),
            f"{loss.mean:.4f}",
            _number(loss.spread, ".4f"),
            _number(loss.difference, "+.4f"),
            _number(loss.noise, ".4f"),
            f"{format_count(statistics.fmean(steady))} ({statistics.fmean(map(_beside, sessions)):.1f})",
            format_duration(statistics.fmean(seconds)),
            f"{accounting.attention_flops_per_token(config) / 1e6:.1f}",
            f"{accounting.attention_savings(config)['saved_frac_all_in']:.1%}",
            format_count(accounting.total_parameters(config)),
        ])  # fmt: skip
    return (
        f"{'; or '.join(dict.fromkeys(map(_amount, runs)))}.\n\n"
        "- Validation loss: nats a token at the end, mean over seeds; spread: its standard deviation over seeds.\n"
        f"- Difference: to {reference}, seed by seed; noise: its standard error, from how much differences vary over "
        "seeds, all peers together.\n"
        "- Tokens/s: median after the first fifth of the steps; in parentheses how many other processes of the study "
        "were on the same device, on average. With such company neither it nor the wall clock says how fast a peer is: "
        "tools/benchmark_training.py does.\n"
        "- Wall clock: of the processes that trained a run, start and validation included; mean over seeds.\n"
        "- Attention: the operators, forward, all-in; saved: of them, against dense attention in every layer.\n\n"
        + markdown_table(HEADER, table)
    )


def _amount(run: StudyRun) -> str:
    """What it trains on."""
    steps, tokens = run.config.train.steps, run.step_tokens
    return (
        f"{steps} steps of {format_count(tokens)} tokens, {format_count(steps * tokens)} in all, in sequences of "
        f"{run.config.data.sequence_tokens}"
    )


def _speeds(run: StudyRun) -> list[float]:
    """Tokens a second of the logged steps after the first fifth; the last step always is one."""
    speeds = column(run.rows(), "tokens_per_s")
    return [speed for step, speed in speeds.items() if step > run.config.train.steps // 5]


def _beside(sessions: Iterable[Any]) -> float:
    """Processes on the same device, on average over the seconds of the sessions."""
    seconds = sum(session.seconds for session in sessions)
    return sum(session.beside * session.seconds for session in sessions) / seconds if seconds else 0.0


# -------------------------------------------------------------------------------------------------------- evaluation


def _position_text(runs: Sequence[StudyRun], found: Mapping[str, dict], reference: str) -> str | None:
    runs = [run for run in runs if found[run.title]["position"]]
    bins = {run.title: _bins(found[run.title]["position"]["buckets"]) for run in runs}
    columns = sorted({place for of_run in bins.values() for place in of_run})
    if not columns:
        return None
    table = _columns_table(
        runs,
        reference,
        "position",
        {_span(*place): (lambda run, place=place: bins[run.title].get(place)) for place in columns},
        lambda x: f"{x.mean:.4f}" + ("" if x.difference is None else f" ({x.difference:+.4f})"),
    )
    return (
        "## Loss by position\n\nNats a token by how many tokens of its document a row has before it; in parentheses "
        f"the difference to {reference}, seed by seed. Noise: of a difference of a peer with all seeds.\n\n{table}"
    )


def _bins(buckets: Sequence[Sequence[Any]]) -> dict[tuple[int, int], float]:
    """Mean loss by (first, last) position: the near ones together, then as they are."""
    near = [mean for first, last, mean in buckets if last < NEAR_TOKENS]
    found = {(first, last): mean["mean"] for first, last, mean in buckets if last >= NEAR_TOKENS}
    if near:
        count = sum(mean["count"] for mean in near)
        found[0, NEAR_TOKENS - 1] = sum(mean["mean"] * mean["count"] for mean in near) / count
    return found


def _needle_text(runs: Sequence[StudyRun], found: Mapping[str, dict], reference: str) -> str | None:
    runs = [run for run in runs if found[run.title]["needle"]]
    rows = {(run.title, row["distance"]): row for run in runs for row in found[run.title]["needle"]}
    distances = sorted({distance for _, distance in rows})
    if not distances:
        return None

    def table(quantity: str, shown: str) -> str:
        def at(distance: int) -> Callable[[StudyRun], float | None]:
            return lambda run: rows[run.title, distance][quantity]["mean"] if (run.title, distance) in rows else None

        columns = {str(distance): at(distance) for distance in distances}
        return _columns_table(runs, reference, "distance", columns, lambda x: format(x.mean, shown))

    return (
        f"## Needle\n\nShare of needles whose value is predicted whole, by distance in tokens. {_ASKED_NOISE} "
        f"{reference}.\n\n{table('whole_value', '.3f')}\n\n"
        "Nats a token of the value that the needle saves, against the same text without it.\n\n"
        + table("gain_nats", ".3f")
    )


def _pairs_text(runs: Sequence[StudyRun], found: Mapping[str, dict], reference: str) -> str | None:
    runs = [run for run in runs if found[run.title]["pairs"]]
    rows = {
        (run.title, (row["first_distance"], row["last_distance"])): row["right"]["mean"]
        for run in runs
        for row in found[run.title]["pairs"]
    }
    columns = {
        _span(*place): (lambda run, place=place: rows.get((run.title, place)))
        for place in sorted({place for _, place in rows})
    }
    if not columns:
        return None
    table = _columns_table(runs, reference, "distance", columns, lambda x: f"{x.mean:.3f}")
    return (
        f"## Associative recall\n\nShare of questions answered right, by distance in tokens. {_ASKED_NOISE} "
        f"{reference}.\n\n{table}"
    )


def _columns_table(
    runs: Sequence[StudyRun],
    reference: str,
    title: str,
    columns: Mapping[str, Callable[[StudyRun], float | None]],
    shown: Callable[[Compared], str],
) -> str:
    """A row for every peer, then one with the noise of a difference; a column for every quantity."""
    cells = {name: compared(_values(runs, of), reference) for name, of in columns.items()}
    table = [
        [peer, *(shown(of_peer[peer]) if peer in of_peer else NOTHING for of_peer in cells.values())]
        for peer in _by_peer(runs)
    ]
    noises = [[x.noise for x in of_peer.values() if x.noise is not None] for of_peer in cells.values()]
    table.append(["noise", *(_number(min(some, default=None), ".4f") for some in noises)])
    return markdown_table([title, *columns], table)


# ------------------------------------------------------------------------------------------------------------- runs


def _by_peer(runs: Sequence[StudyRun]) -> dict[str, list[StudyRun]]:
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        found.setdefault(run.peer, []).append(run)
    return found


def _values(runs: Sequence[StudyRun], of: Callable[[StudyRun], float | None]) -> Values:
    """What runs have of a quantity; runs without it, and peers without any, are left out."""
    found: Values = {}
    for run in runs:
        value = of(run)
        if value is not None:
            found.setdefault(run.peer, {})[run.seed] = value
    return found


def _number(value: float | None, shown: str) -> str:
    return NOTHING if value is None else format(value, shown)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
