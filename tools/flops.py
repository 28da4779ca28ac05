"""What the attention of a configuration costs, and what it saves against dense attention; needs no torch.

    python tools/flops.py --config configs/model/maha.yaml --sequence 4096 [--json]

Counted all-in, the same on both sides; maha_megatron/config/accounting.py says how. Attention's share of a step is
printed for the configuration and, beside it, for five models at two sizes at the same sequence length; the windows see
as many keys as MAHA's default windows at that length, whatever their files say.
"""

import argparse
import json
import sys
from typing import Any

from maha_megatron import scales
from maha_megatron.config import accounting, aggregation_cost
from maha_megatron.config.derive import layer_attention, maha_windows, scaled_kinds
from maha_megatron.config.load import load_config, load_fragments
from maha_megatron.config.schema import Config
from maha_megatron.errors import MahaError
from maha_megatron.units import format_count

MODELS = ("maha", "window", "hybrid", "window_hybrid", "dense")
WINDOW_MODELS = ("window", "window_hybrid")
SIZES = ("125m", "7b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run or model file")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence; default: data.sequence_tokens of the file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    length = [f"data.sequence_tokens={args.sequence}"] if args.sequence is not None else []
    try:
        report = flops_report(load_config(args.config, [*args.set, *length]))
    except MahaError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if args.json else _tables(report))
    return 0


def flops_report(config: Config) -> dict[str, Any]:
    """Everything this tool knows about a configuration, as plain data."""
    terms = accounting.flops_per_token(config)
    kinds = layer_attention(config)
    return {
        "sequence_tokens": config.data.sequence_tokens,
        "layers": {kind: kinds.count(kind) for kind in ("maha", "refined", "dense")},
        "windows": {kind: list(maha_windows(config, kind)) for kind in scaled_kinds(config)},
        "parameters": accounting.parameter_counts(config),
        "total_parameters": accounting.total_parameters(config),
        **accounting.attention_savings(config),
        "attention_flops_per_sequence_and_layer": {
            kind: flops
            for kind, flops in accounting.attention_flops(config, config.data.sequence_tokens).items()
            if kind in kinds or kind == "dense"
        },
        "notes": list(dict.fromkeys(note for kind in scaled_kinds(config) for note in _notes(config, kind))),
        "forward_flops_per_token": terms,
        "training_flops_per_token": accounting.training_flops_per_token(config),
        "attention_share_frac": accounting.attention_share(config),
        "keys_of_windows": sum(scales.default_windows(config.data.sequence_tokens)),
        "attention_share_frac_of_others": _shares(config.data.sequence_tokens),
    }


def _notes(config: Config, kind: str) -> list[str]:
    """What is assumed, or left out, in counting how the scales are fused; empty where everything is counted."""
    maha, levels = config.maha, len(maha_windows(config, kind))
    if maha.aggregation == "program":
        return [f"the solver of {maha.program} is not counted: what a stated program costs has to be measured"]
    if levels == 1 or maha.aggregation == "mean" or (maha.aggregation, maha.coupling) == ("convex", "none"):
        return []
    if maha.regularizer == "entropy":
        return [f"solver: {aggregation_cost.NEWTON_STEPS} Newton steps, a mean"]
    if levels <= aggregation_cost.ENUMERATED_SCALES:
        return [f"solver: {2**levels - 1} supports"]
    return [f"solver: {aggregation_cost.PATH_STEPS} steps along the path, a mean"]


def _shares(sequence_tokens: int) -> dict[str, dict[str, float]]:
    """Attention's share of a step by model and size, each at `sequence_tokens` and with as many keys."""
    length = [f"data.sequence_tokens={sequence_tokens}"]
    keys = [f"maha.windows=[{sum(scales.default_windows(sequence_tokens))}]"]
    shares: dict[str, dict[str, float]] = {}
    for model in MODELS:
        overrides = length + keys if model in WINDOW_MODELS else length
        models = {size: load_fragments([f"model/{model}", f"size/{size}"], overrides) for size in SIZES}
        shares[model] = {size: accounting.attention_share(config) for size, config in models.items()}
    return shares


def _tables(report: dict[str, Any]) -> str:
    layers = ", ".join(f"{count} {kind}" for kind, count in report["layers"].items() if count)
    parameters = format_count(report["total_parameters"])
    windows = "".join(f", windows of {kind} layers {windows}" for kind, windows in report["windows"].items())
    lines = [
        f"{parameters} parameters, layers: {layers}, {report['sequence_tokens']} tokens{windows}",
        "",
        "attention saved against dense in every layer",
        f"  visible pairs        {report['saved_frac_pairs']:7.1%}",
        f"  loaded 64-wide tiles {report['saved_frac_loaded']:7.1%}",
        f"  all-in operations    {report['saved_frac_all_in']:7.1%}",
        "",
        "operator, forward, FLOP per sequence and layer",
    ]
    for kind, flops in report["attention_flops_per_sequence_and_layer"].items():
        lines += [f"  {kind:7} {term:18} {format_count(value):>9}" for term, value in flops.items() if value]
        lines.append(f"  {kind:7} {'sum':18} {format_count(sum(flops.values())):>9}")
    lines += [f"  {note}" for note in report["notes"]]
    forward = report["forward_flops_per_token"]
    lines += ["", "model, forward, FLOP per token (backward: twice as many)"]
    lines += [
        f"  {term:25} {format_count(value):>9} {value / sum(forward.values()):7.1%}" for term, value in forward.items()
    ]
    lines += ["", f"attention's share of a step: {report['attention_share_frac']:.1%}", "beside it, at this length"]
    lines.append(f"  {'':13}" + "".join(f"{size:>8}" for size in SIZES))
    for model, shares in report["attention_share_frac_of_others"].items():
        note = f"   {report['keys_of_windows']} keys" if model in WINDOW_MODELS else ""
        lines.append(f"  {model:13}" + "".join(f"{share:8.1%}" for share in shares.values()) + note)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
