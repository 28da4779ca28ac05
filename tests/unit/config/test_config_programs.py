"""Code that a configuration names runs only where the command line gives the very same name."""

import pytest

from maha_megatron.config.load import config_from_dict
from maha_megatron.config.programs import allowed_program, states_program
from maha_megatron.errors import ConfigError

STATED = {"maha": {"aggregation": "program", "program": "mine:build"}}


def test_the_same_name_is_allowed():
    assert allowed_program(config_from_dict(STATED), "mine:build") == "mine:build"


@pytest.mark.parametrize(
    ("tree", "allowed", "said"),
    [
        (STATED, None, "mine:build is code that would run here.*or a checkpoint.* add --allow-program mine:build"),
        (STATED, "mine:other", "--allow-program mine:other is not what maha.program names: mine:build"),
        (STATED, "", "is not what maha.program names"),
        ({"maha": {"aggregation": "program"}}, "mine:build", "needs maha.program: module:function"),
        ({}, "mine:build", "no effect, since no layer has maha.aggregation: program; remove it"),
        ({**STATED, "model": {"attention": ["dense"]}}, "mine:build", "no effect"),
    ],
)
def test_anything_else_is_refused(tree, allowed, said):
    with pytest.raises(ConfigError, match=said):
        allowed_program(config_from_dict(tree), allowed)


@pytest.mark.parametrize("tree", [{}, {"maha": {"aggregation": "nash"}}, {**STATED, "model": {"attention": ["dense"]}}])
def test_without_a_program_nothing_is_asked(tree):
    assert not states_program(config_from_dict(tree))
    assert allowed_program(config_from_dict(tree), None) is None
