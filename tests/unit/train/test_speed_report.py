"""Ratios against dense are shown where dense is calibrated, and nowhere else."""

import pytest

from maha_megatron.train.speed_report import (
    Speed,
    against_dense,
    calibrated,
    calibration_text,
    profile_text,
    speed_table,
)
from maha_megatron.train.step_profile import StepProfile

SPEEDS = [
    Speed(model=model, length=length, tokens_per_s=speed)
    for model, length, speed in (
        ("dense", 4096, 100.0),
        ("maha", 4096, 120.0),
        ("dense", 32768, 50.0),
        ("maha", 32768, 90.0),
        ("hybrid", 8192, 70.0),
    )
]


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_no_calibration_no_ratio():
    assert against_dense(SPEEDS, None) == {}
    assert cells(speed_table(SPEEDS, None, {}))["maha", "4096"] == ["120", "-", "-", "-"]


def test_ratios_are_of_one_length_and_aims_are_met_or_missed():
    calibration = calibrated(SPEEDS, "dense", {4096: 110.0, 32768: 55.0})
    assert against_dense(SPEEDS, calibration) == {
        ("dense", 4096): 1.0,
        ("maha", 4096): 1.2,
        ("dense", 32768): 1.0,
        ("maha", 32768): 1.8,
    }
    profile = StepProfile(step_s=0.25, device_s=0.1, attention_frac=0.25, kernels=[])
    table = cells(speed_table(SPEEDS, calibration, {("maha", 4096): profile}))
    assert table["maha", "4096"] == ["120", "1.20", "1.15: met", "25 %"]
    assert table["maha", "32768"] == ["90", "1.80", "2.0: missed", "-"]
    assert table["hybrid", "8192"] == ["70", "withheld", "-", "-"], "there is no dense at 8192"


@pytest.mark.parametrize(("llama", "shown"), [(111.1, True), (111.2, False)])
def test_below_nine_tenths_of_llama_every_ratio_of_that_length_is_withheld(llama, shown):
    calibration = calibrated(SPEEDS, "dense", {4096: llama, 32768: 50.0})
    table = cells(speed_table(SPEEDS, calibration, {}))
    assert table["maha", "4096"][1] == ("1.20" if shown else "withheld")
    assert table["maha", "4096"][2] == ("1.15: met" if shown else "-")
    assert table["maha", "32768"][1] == "1.80", "another length is calibrated by itself"
    text = calibration_text(calibration)
    assert ("MISSED" in text) != shown
    assert ("At 4096 tokens dense is below 0.9 of LlamaForCausalLM" in text) != shown
    assert "| 32768 | 50 | 50 | 1.00 | met |" in text


def test_another_model_may_be_the_one_that_is_calibrated():
    calibration = calibrated([*SPEEDS, Speed(model="llama", length=4096, tokens_per_s=95.0)], "llama", {4096: 100.0})
    assert against_dense(SPEEDS, calibration)["maha", 4096] == 1.2
    assert "| 4096 | 95 | 100 | 0.95 | met |" in calibration_text(calibration)


def test_a_profile_says_what_the_device_did():
    profile = StepProfile(
        step_s=0.25, device_s=0.2, attention_frac=0.125, kernels=[("gemm", 12.0, 0.05), ("x" * 99, 1.0, 0.01)]
    )
    text = profile_text("maha", 4096, profile)
    assert "### maha, 4096 tokens: a step of 250.0 ms, 200.0 ms of the device's work, of it attention 12.5 %" in text
    assert "| `gemm` | 12 | 50.00 | 25.0 |" in text
    assert f"| `{'x' * 90}` | 1 | 10.00 | 5.0 |" in text
