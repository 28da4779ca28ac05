"""Speeds of architectures side by side: against dense where dense is calibrated, and where a step's time goes.

A ratio against dense says something about attention only if our dense model is as fast as a dense model can be expected
to be: at least LEAST_OF_LLAMA of the tokens a second of transformers' LlamaForCausalLM at the same length. Where it is
not, or nobody looked, no ratio is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maha_megatron.train.result_files import markdown_table
from maha_megatron.train.step_profile import StepProfile

LEAST_OF_LLAMA = 0.9
DENSE = "dense"
AIMS = {("maha", 4096): 1.15, ("maha", 32768): 2.0}  # tokens a second, times those of dense
WITHHELD = "withheld"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median tokens a second of one model at one length."""

    model: str
    length: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tokens a second of our dense model and of Llama, by length."""

    model: str
    ours: Mapping[int, float]
    llama: Mapping[int, float]

    def ratio(self, length: int) -> float:
        return self.ours[length] / self.llama[length]

    def passed(self, length: int) -> bool:
        return length in self.ours and self.ratio(length) >= LEAST_OF_LLAMA


def calibrated(speeds: Sequence[Speed], model: str, llama: Mapping[int, float]) -> Calibration:
    """Of the speeds of `model` and those of Llama at the same lengths."""
    ours = {speed.length: speed.tokens_per_s for speed in speeds if speed.model == model}
    return Calibration(model=model, ours=ours, llama=llama)


def against_dense(speeds: Sequence[Speed], calibration: Calibration | None) -> dict[tuple[str, int], float]:
    """Tokens a second of each model over those of dense at the same length, where calibration allows a ratio."""
    dense = {speed.length: speed.tokens_per_s for speed in speeds if speed.model == DENSE}
    return {
        (speed.model, speed.length): speed.tokens_per_s / dense[speed.length]
        for speed in speeds
        if speed.length in dense and calibration is not None and calibration.passed(speed.length)
    }


def speed_table(
    speeds: Sequence[Speed], calibration: Calibration | None, profiles: Mapping[tuple[str, int], StepProfile]
) -> str:
    """Every model and length; the ratio, whether it meets its aim, and attention's share of the device's time."""
    ratios = against_dense(speeds, calibration)
    table = []
    for speed in speeds:
        key = (speed.model, speed.length)
        ratio = f"{ratios[key]:.2f}" if key in ratios else WITHHELD if calibration else "-"
        aim = AIMS.get(key)
        met = "-" if aim is None or key not in ratios else f"{aim}: {'met' if ratios[key] >= aim else 'missed'}"
        share = f"{100 * profiles[key].attention_frac:.0f} %" if key in profiles else "-"
        table.append([speed.model, speed.length, f"{speed.tokens_per_s:.0f}", ratio, met, share])
    header = ["model", "tokens", "tokens/s", f"x {DENSE}", "aim", "attention's share"]
    return markdown_table(header, table)


def calibration_text(calibration: Calibration) -> str:
    """A table of both sides by length, and what follows where ours is too slow."""
    table = []
    for length, llama in calibration.llama.items():
        passed = "met" if calibration.passed(length) else "MISSED"
        table.append(
            [length, f"{calibration.ours[length]:.0f}", f"{llama:.0f}", f"{calibration.ratio(length):.2f}", passed]
        )
    model = calibration.model
    header = ["tokens", f"{model}, tokens/s", "LlamaForCausalLM, tokens/s", "ratio", f"at least {LEAST_OF_LLAMA}"]
    text = markdown_table(header, table)
    slow = [length for length in calibration.llama if not calibration.passed(length)]
    if slow:
        at = ", ".join(str(length) for length in slow)
        text += (
            f"\n\nAt {at} tokens {model} is below {LEAST_OF_LLAMA} of LlamaForCausalLM: no ratio against {DENSE} is "
            "shown there. Profile it (--profile) and mend what is slow around attention first."
        )
    return text


def profile_text(model: str, length: int, profile: StepProfile) -> str:
    """Kernels of one step by time."""
    rows = [
        [f"`{name[:90]}`", f"{calls:.0f}", f"{1e3 * seconds:.2f}", f"{100 * seconds / profile.device_s:.1f}"]
        for name, calls, seconds in profile.kernels
    ]
    title = (
        f"### {model}, {length} tokens: a step of {1e3 * profile.step_s:.1f} ms, "
        f"{1e3 * profile.device_s:.1f} ms of the device's work, of it attention {100 * profile.attention_frac:.1f} %"
    )
    return f"{title}\n\n" + markdown_table(["kernel", "calls", "ms", "%"], rows)
