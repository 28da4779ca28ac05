"""An evaluation for people: Markdown tables, each after what its numbers are."""

from maha_megatron.train.evaluation import Findings, Settings
from maha_megatron.train.loss_by_position import PositionLoss
from maha_megatron.train.recall import KEY_TOKENS, VALUE_TOKENS, NeedleRecall, PairRecall
from maha_megatron.train.result_files import markdown_table


def findings_text(findings: Findings) -> str:
    """All parts that were measured."""
    parts = []
    if findings.position:
        parts.append(_position_text(findings.position, findings.bits_per_byte))
    if findings.needle:
        parts.append(_needle_text(findings.needle, findings.needle_texts, findings.settings))
    if findings.pairs:
        parts.append(_pairs_text(findings.pairs, findings.settings))
    return "\n\n".join(parts)


def _position_text(position: PositionLoss, bits_per_byte: float | None) -> str:
    overall = position.overall
    byte = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits a byte"
    rows = [[_span(first, last), mean.count, mean] for first, last, mean in position.buckets]
    return (
        f"## Loss by position\n\n{overall} nats a token, {overall.count} tokens of {overall.groups} samples{byte}.\n"
        "Position: tokens of its document that a row can see before its own. ±: standard error over samples.\n\n"
        + markdown_table(["position", "tokens", "nats"], rows)
    )


def _needle_text(needle: tuple[NeedleRecall, ...], texts: int, settings: Settings) -> str:
    rows = [
        [row.distance, row.whole_value, row.first_token, row.loss_nats, row.control_nats, row.gain_nats]
        for row in needle
    ]
    header = ["distance", "whole value right", "first token right", "nats a token", "control", "gain"]
    return (
        f"## Needle\n\nA key of {KEY_TOKENS} random tokens with a value of {VALUE_TOKENS}, in "
        f"{settings.sequence_tokens} tokens of text; "
        f"{settings.needles} needles in {texts} texts at each distance. Control: the same without the needle.\n\n"
        + markdown_table(header, rows)
    )


def _pairs_text(pairs: tuple[PairRecall, ...], settings: Settings) -> str:
    rows = [[_span(row.first_distance, row.last_distance), row.right.count, row.right, row.loss_nats] for row in pairs]
    return (
        f"## Associative recall\n\n{settings.pairs} pairs of random tokens in a row, one asked for; a guess among the "
        f"values seen is right in {1 / settings.pairs:.4f}.\n\n"
        + markdown_table(["distance", "questions", "right", "nats"], rows)
    )


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
