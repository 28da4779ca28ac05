"""Pictures of what MAHA layers did with a text, each beside a JSON file with the data behind it.

scale_weights_layer_00.png    each token's weight of every scale, a panel for every head
receptive_field_layer_00.png  mass by distance, and how many rows back hold 50 % and 90 % of it, by token
solver.png                    residuals and steps of the solver by token and layer, where something is solved
summary.json                  the text's tokens, and each layer in a few numbers
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from maha_megatron.attention.reach import SHARES, LayerReach, distance_edges
from maha_megatron.checkpoint.layout import replace_text

SUMMARY = "summary.json"
_DIGITS = 5
_PANELS_WIDE = 4


def write_report(
    folder: Path, layers: Mapping[int, LayerReach], pieces: Sequence[str], facts: Mapping[str, Any]
) -> list[Path]:
    """Write every picture and its data.

    Args:
        folder: receives the files; made if it is not there, files of the same names are replaced.
        layers: what `inspect_layers` found.
        pieces: the text of every token.
        facts: what the summary says first, JSON-serialisable.

    Returns:
        Paths of what was written, pictures before their data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, layer in layers.items():
        data = {"layer": index, "scale_weights_tnl": _rounded(layer.scale_weights_tnl)}
        written += _write(folder, f"scale_weights_layer_{index:02}", _weights_figure(index, layer), data)
        written += _write(folder, f"receptive_field_layer_{index:02}", _reach_figure(index, layer), _reach_data(layer))
    solved = {index: layer for index, layer in layers.items() if layer.solves is not None}
    if solved:
        written += _write(folder, "solver", _solver_figure(solved), _solver_data(solved))
    summary = {**facts, "tokens": list(pieces), "layers": {index: summarised(layer) for index, layer in layers.items()}}
    replace_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return [*written, folder / SUMMARY]


def summarised(layer: LayerReach) -> dict[str, Any]:
    """One layer in a few numbers: means over tokens and heads, and the solver's worst."""
    found: dict[str, Any] = {"mean_scale_weight_l": _rounded(layer.scale_weights_tnl.float().mean((0, 1)))}
    for share, within_tn in zip(SHARES, layer.within_tnf.unbind(-1), strict=True):
        found[f"mean_rows_for_{share:.0%}"] = round(within_tn.double().mean().item(), 1)
    if layer.solves is None:
        return found | {"solver": "closed form"}
    worst = f"{layer.solves.residual_tn.max().item():.2g}"
    solver = {"largest_residual": float(worst), "missed": int(layer.solves.missed)}
    if layer.solves.steps_tn is not None:
        solver["mean_steps"] = round(layer.solves.steps_tn.double().mean().item(), 2)
    return found | {"solver": solver}


def _weights_figure(index: int, layer: LayerReach) -> Figure:
    weights_tnl = layer.scale_weights_tnl.float().cpu()
    rows, heads, scales = weights_tnl.shape
    figure, panels = _panels(heads, f"layer {index}: weight of each scale by token")
    for head, axes in enumerate(panels):
        bands = [weights_tnl[:, head, scale].tolist() for scale in range(scales)]
        axes.stackplot(range(rows), bands, labels=layer.names_l)
        axes.set(title=f"head {head}", xlim=(0, rows - 1), ylim=(0, 1), xlabel="token")
    panels[0].legend(loc="lower left", fontsize="x-small")
    return figure


def _reach_figure(index: int, layer: LayerReach) -> Figure:
    rows, heads, _ = layer.within_tnf.shape
    edges = distance_edges(rows)
    figure = Figure(figsize=(11, 4.5), dpi=100)
    by_distance, by_token = figure.subplots(1, 2)
    for head in range(heads):
        mass = layer.mass_by_distance_nk[head].tolist()
        by_distance.plot(range(len(edges)), mass, "o-", markersize=3, label=f"head {head}")
    labels = [str(edge) for edge in edges]
    by_distance.set_xticks(range(len(edges)), labels, rotation=60, fontsize="x-small")
    by_distance.set(xlabel="distance from, rows", ylabel="mass, mean over tokens", title=f"layer {index}: mass")
    if heads <= 16:
        by_distance.legend(fontsize="x-small")
    for share, within_tn in zip(SHARES, layer.within_tnf.double().unbind(-1), strict=True):
        line = by_token.plot(range(rows), within_tn.mean(-1).tolist(), label=f"{share:.0%} of the mass, mean head")[0]
        low, high = within_tn.min(-1).values.tolist(), within_tn.max(-1).values.tolist()
        by_token.fill_between(range(rows), low, high, alpha=0.15, color=line.get_color(), label="all heads")
    by_token.set(xlabel="token", ylabel="rows back that hold it", title=f"layer {index}: effective receptive field")
    by_token.legend(fontsize="x-small")
    figure.tight_layout()
    return figure


def _reach_data(layer: LayerReach) -> dict[str, Any]:
    return {
        "definition": "a block's mass, scale weight times probability, is spread evenly over its rows",
        "distance_from_rows_k": distance_edges(len(layer.within_tnf)),
        "mass_by_distance_nk": _rounded(layer.mass_by_distance_nk),
        "shares_f": list(SHARES),
        "rows_within_tnf": layer.within_tnf.tolist(),
    }


def _solver_figure(layers: Mapping[int, LayerReach]) -> Figure:
    figure = Figure(figsize=(11, 4.5), dpi=100)
    residuals, steps = figure.subplots(1, 2)
    for index, layer in layers.items():
        worst = layer.solves.residual_tn.double().max(-1).values.clamp(min=1e-18)
        residuals.plot(range(len(worst)), worst.tolist(), ".", markersize=3, label=f"layer {index}")
        if layer.solves.steps_tn is not None:
            most = layer.solves.steps_tn.max(-1).values
            steps.plot(range(len(most)), most.tolist(), ".", markersize=3, label=f"layer {index}")
    residuals.set(yscale="log", xlabel="token", title="residual of the worst head, relative")
    steps.set(xlabel="token", title="steps of the slowest head")
    residuals.legend(fontsize="x-small")
    figure.tight_layout()
    return figure


def _solver_data(layers: Mapping[int, LayerReach]) -> dict[str, Any]:
    return {
        index: {
            "missed": int(layer.solves.missed),
            "residual_tn": [[float(f"{value:.3g}") for value in row] for row in layer.solves.residual_tn.tolist()],
            "steps_tn": None if layer.solves.steps_tn is None else layer.solves.steps_tn.tolist(),
        }
        for index, layer in layers.items()
    }


def _panels(count: int, title: str) -> tuple[Figure, list]:
    wide = min(count, _PANELS_WIDE)
    high = -(-count // wide)
    figure = Figure(figsize=(3.2 * wide, 2.2 * high + 0.6), dpi=100)
    grid = figure.subplots(high, wide, squeeze=False)
    for spare in grid.flat[count:]:
        spare.remove()
    figure.suptitle(title)
    figure.set_layout_engine("tight")
    return figure, list(grid.flat[:count])


def _write(folder: Path, name: str, figure: Figure, data: Mapping[str, Any]) -> list[Path]:
    picture, numbers = folder / f"{name}.png", folder / f"{name}.json"
    partial = picture.with_name(f"{picture.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, picture)
    replace_text(numbers, json.dumps(data, separators=(",", ":")) + "\n")
    return [picture, numbers]


def _rounded(values: torch.Tensor) -> list:
    return values.double().mul(10**_DIGITS).round().div(10**_DIGITS).tolist()
