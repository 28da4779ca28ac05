#!/usr/bin/env python
"""Look at attention: the masks of a configuration, or what the MAHA layers of a trained run do with a text.

    python tools/inspect_attention.py --config configs/model/maha.yaml --masks
    python tools/inspect_attention.py --config FILE --masks --documents 9 7 --rows 12 --set maha.windows=[4,2] ...
    python tools/inspect_attention.py --checkpoint runs/quickstart/train --text README.md

--masks needs no torch: for some rows one line a scale, and row by block where the sequence is short. With --checkpoint
it draws each token's scale weights by layer and head, the effective receptive field (how far back the attention mass
lies; maha_megatron/attention/reach.py says how it is counted) and the solver's residuals: PNG, and JSON with the data.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.attention import mask_drawing
from maha_megatron.config import programs
from maha_megatron.config.derive import layer_attention, maha_windows, scaled_kinds
from maha_megatron.config.load import load_config
from maha_megatron.errors import ConfigError, DataError, exit_code_of


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="inspect_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="run or model file, for --masks")
    source.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a run's folder (its newest), or a step's")
    masks = parser.add_argument_group("with --config")
    masks.add_argument("--masks", action="store_true", help="draw what rows see at every scale")
    masks.add_argument("--rows", type=int, nargs="+", metavar="ROW", help="rows to draw (default: some telling ones)")
    masks.add_argument("--documents", type=int, nargs="+", metavar="ROWS", help="lengths of packed documents")
    masks.add_argument("--width", type=int, default=100, help="characters of a line (%(default)s)")
    masks.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key; may be repeated")
    look = parser.add_argument_group("with --checkpoint")
    look.add_argument("--text", help="file with the text, - for standard input")
    look.add_argument("--tokens", type=int, help="first tokens of the text at most (default: the run's sequence)")
    look.add_argument("--tokenizer", help="tokenizer, if it has moved since the run (default: the run's)")
    look.add_argument("--output", type=Path, help="receives the pictures (default: attention/STEP in the run's folder)")
    look.add_argument(programs.OPTION, metavar="MODULE:FUNCTION", help=programs.OPTION_HELP)
    options = parser.parse_args(arguments)
    if options.config and not options.masks:
        parser.error("--config needs --masks")
    if options.checkpoint and not options.text:
        parser.error("--checkpoint needs --text")
    if options.checkpoint:
        source, strangers = "checkpoint", ("masks", "rows", "documents", "width", "set")
    else:
        source, strangers = "config", ("text", "tokens", "tokenizer", "output", "allow_program")
    for name in strangers:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does not go with --{source}")
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens needs at least 1")
    return options


def draw_masks(options: argparse.Namespace) -> None:
    """Print the masks of a configuration."""
    config = load_config(options.config, options.set)
    if not scaled_kinds(config):
        raise ConfigError("model.attention has no maha layer: a dense layer sees every row up to its own")
    lengths = options.documents or [config.data.sequence_tokens]
    if min(lengths) < 1:
        raise ConfigError("--documents: every document needs at least one row")
    by_windows = {maha_windows(config, kind): kind for kind in scaled_kinds(config)}
    for windows, kind in by_windows.items():
        if len(by_windows) > 1:
            print(f"layers of kind {kind}")
        _draw(windows, lengths, config.maha.ratio, options)
    if "refined" in layer_attention(config):
        print(f"not drawn: {config.refine.blocks} blocks that rows of a refined layer open, which depend on the text")


def _draw(windows: tuple[int, ...], lengths: Sequence[int], ratio: int, options: argparse.Namespace) -> None:
    """Print the masks of one kind of layers."""
    total = sum(lengths)
    for row in options.rows or mask_drawing.telling_rows(total, ratio, windows):
        if not 0 <= row < total:
            raise ConfigError(f"--rows {row}: the sequence has rows 0 to {total - 1}")
        print(mask_drawing.draw_row(row, lengths, ratio, windows, options.width), end="\n\n")
    print(mask_drawing.LEGEND, mask_drawing.SCALED_LEGEND, sep="\n")
    if total <= mask_drawing.LONGEST_MATRIX_ROWS:
        print("", mask_drawing.draw_matrix(lengths, ratio, windows), sep="\n")


def look_at_text(options: argparse.Namespace) -> None:
    """Load a run, run the text through it, write the pictures."""
    from maha_megatron.checkpoint.trained import checkpoint_at, open_trained
    from maha_megatron.model.inspection import inspect_layers
    from maha_megatron.parallel import compat
    from maha_megatron.train.attention_report import summarised, write_report

    checkpoint = checkpoint_at(options.checkpoint)
    text = _read(options.text)
    _say(f"loading {checkpoint}")
    trained = open_trained(checkpoint, options.tokenizer, allow_program=options.allow_program)
    limit = options.tokens or trained.config.data.sequence_tokens
    tokens = trained.tokenizer.encode(text)
    if len(tokens) > limit:
        _say(f"the text has {len(tokens)} tokens; looking at the first {limit}")
        tokens = tokens[:limit]
    layers = inspect_layers(trained.model, tokens, lambda layer: _say(f"layer {layer} done"))
    pieces = [trained.tokenizer.decode([token]) for token in tokens]
    folder = options.output or checkpoint.parents[1] / "attention" / checkpoint.name
    windows = {kind: maha_windows(trained.config, kind) for kind in scaled_kinds(trained.config)}
    facts = {"checkpoint": str(checkpoint), "windows": windows, "ratio": trained.config.maha.ratio}
    written = write_report(folder, layers, pieces, facts)
    compat.shutdown()
    for index, layer in layers.items():
        found = summarised(layer)
        weights = " ".join(f"{weight:.3f}" for weight in found.pop("mean_scale_weight_l"))
        rest = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())
        print(f"layer {index}: scale weights {weights}, {rest}")
    print(f"{len(written)} files in {folder}")


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {name}: cannot be read as UTF-8 text ({error})") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    return exit_code_of(lambda: draw_masks(options) if options.config else look_at_text(options))


if __name__ == "__main__":
    sys.exit(main())
