"""MahaSpec refuses what it would not run as written, by the same tables as the configuration."""

import dataclasses

import pytest

from maha_megatron.attention.spec import CHOICES, NOT_READ, MahaSpec, absent_program
from maha_megatron.config import rules
from maha_megatron.config.schema import Maha
from maha_megatron.errors import ConfigError

SMALL = {"ratio": 4, "windows": (6, 5, 12)}


def test_the_configuration_offers_the_same_choices_and_refuses_the_same_options():
    offered = {field.name: field.metadata["choices"] for field in dataclasses.fields(Maha)}
    of_spec = {field.name for field in dataclasses.fields(MahaSpec)}
    assert {name: offered[name] for name in offered.keys() & of_spec if offered[name]} == CHOICES
    assert {name: keys for name, (keys, _) in NOT_READ.items()} == {
        name: keys for name, (keys, _) in rules._NOT_READ.items()
    }
    shared = {name for keys, _ in NOT_READ.values() for name in keys} - {"program"}
    assert all(getattr(Maha(), name) == getattr(MahaSpec(**SMALL), name) for name in shared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "nahs"}, r"aggregation='nahs' is none of the choices; use one of .*\"nash\""),
        ({"coupling": "gramm"}, r"coupling='gramm' .*\"none\", \"gram\""),
        ({"queries": "pooledd"}, r"queries='pooledd' .*\"full\", \"pooled\""),
        ({"downsampling": "average"}, r"downsampling='average' .*\"gated\", \"conv\", \"mean\", \"max\""),
        ({"regularizer": "entropi"}, r"regularizer='entropi' .*\"entropy\", \"quadratic\""),
        ({"program": absent_program}, r"program: no effect with aggregation=\"convex\" .*remove"),
        ({"aggregation": "nash", "program": absent_program}, 'program: no effect with aggregation="nash"'),
        ({"aggregation": "mean", "coupling": "gram"}, 'coupling: no effect with aggregation="mean"'),
        (
            {"aggregation": "mean", "regularizer": "quadratic", "lse_utility": False},
            "regularizer, lse_utility: no effect with .*equal weights depend on nothing",
        ),
        ({"aggregation": "program", "regularizer": "quadratic", "program": absent_program}, "regularizer: no effect"),
        ({"aggregation": "program"}, 'aggregation="program" needs program: a StatedProgram, or absent_program'),
    ],
    ids=str,
)
def test_an_option_that_would_not_run_as_written_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MahaSpec(**SMALL, **options)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MahaSpec(**SMALL), **options)


def test_every_choice_is_accepted():
    for name, known in CHOICES.items():
        for choice in known:
            program = absent_program if choice == "program" else None
            assert getattr(MahaSpec(**SMALL, program=program, **{name: choice}), name) == choice
