"""Kernels compiled ahead, with no card: what the tuned table asks of one."""

import json
import subprocess

import pytest

from tests.support.ahead import EVERYDAY, compilation

pytest.importorskip("triton")
# of one program: Ampere and Ada at their least, and Hopper
SHARED_BYTES = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

# by triton 3.6, between scales or programs, never in the loop over keys or rows (nvdisasm); of games at any width
OF_GAMES = {"equilibrium, a game, 8 scales": 16, "continuation, a game": 8, "continuation, nash": 8}
SPILLED_BYTES = {
    32: OF_GAMES | {"opened keys' gradients": 8},
    64: OF_GAMES | {"opened keys' gradients, 3 heads a group": 32},  # 168 registers, so a third program fits
    128: OF_GAMES
    | {
        "attention, as the table has it": 48,
        "attention, scale by scale, as the table has it": 24,
        "attention, weighed, as the table has it": 72,
        "key gradients": 8,
        "key gradients, as the table has it": 8,
        "key gradients, scale by scale, as the table has it": 8,
        "key gradients, weighed, as the table has it": 8,
        "query gradients, refined": 40,
        "query gradients, refined, 3 heads a group": 40,
        "key gradients, refined, 3 heads a group": 144,  # as of other layers with heads in groups
        "attention, scale by scale": 16,
        "query gradients, scale by scale": 48,
        "attention, weighed": 144,
        "query gradients, weighed": 96,
        "in tokens: attention, weighed": 128,
        "in tokens: attention, weighed, as the table has it": 64,
        "in tokens: query gradients, weighed": 32,
        "in tokens: query gradients, scale by scale": 56,
        "in tokens: key gradients": 8,
        "in tokens: key gradients, as the table has it": 8,
    },
}


def made(process: subprocess.Popen) -> dict[str, dict[str, int]]:
    """What the compiler made of the kernels."""
    found, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(found)


def compiled(capability: int, width: int, dtype: str, which: str = "all") -> dict[str, dict[str, int]]:
    return made(compilation(capability, width, dtype, which))


def check_shared(found: dict[str, dict[str, int]], capability: int) -> None:
    """Shared memory of every kernel."""
    assert {
        name: one["shared_bytes"] for name, one in found.items() if one["shared_bytes"] > SHARED_BYTES[capability]
    } == {}


def overtaken(found: dict[str, dict[str, int]]) -> set[str]:
    """The kernels whose loops write over tiles that unfinished products by warp groups read."""
    return {name for name, one in found.items() if any(tiles < one["stages"] for tiles in one["tiles"])}


def check_counters(found: dict[str, dict[str, int]]) -> None:
    """Both consumers and the loader count tiles and turns from one work to the next; the compiler may drop a counter
    (`add_up` of gluon_key_gradient.py says when).
    """
    assert {name: one["counters"] for name, one in found.items() if one["counters"] != [2, 2, 2]} == {}


def check(found: dict[str, dict[str, int]], capability: int, width: int, dtype: str) -> None:
    """Shared memory of every kernel, and on Hopper what it spills and whether its loads overtake its products."""
    check_shared(found, capability)
    assert overtaken(found) == set()
    if (capability, dtype) == (90, "bfloat16"):
        most = SPILLED_BYTES[width]
        spilled = {name: one["spilled_bytes"] for name, one in found.items()}
        assert {name: number for name, number in spilled.items() if number > most.get(name, 0)} == {}


@pytest.mark.parametrize("capability", EVERYDAY)
def test_kernels_compile_within_the_card(capability, compilations):
    """Every kernel for Ampere, and for Hopper every use that the table knows."""
    found = made(compilations[capability])
    assert len(found) >= 20
    check(found, capability, 128, "bfloat16")
    if capability == 90:
        by_groups = {name: one for name, one in found.items() if name.endswith("as the table has it")}
        assert len(by_groups) == 10
        check_counters(by_groups)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_kernel_compiles_within_the_card(capability, width, dtype):
    check(compiled(capability, width, dtype), capability, width, dtype)


def test_no_loop_of_a_refined_layer_writes_over_what_its_products_still_read():
    """Of blocks of 64 children, whose gradients are products by warp groups on Hopper, the others' beside them not."""
    found = compiled(90, 64, "bfloat16", "refined")
    assert found["key gradients, refined"]["tiles"] == [3, 3]  # those of other kernels are seen
    assert overtaken(found) == set()


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_refined_layers_compile_within_the_card_at_the_ends_of_what_is_served(capability, width, dtype):
    """The most blocks, of the most entries, and 16 heads a group."""
    found = compiled(capability, width, dtype, "refined")
    assert len(found) == 9
    check_shared(found, capability)
    assert overtaken(found) == set()
    if (capability, dtype) == (90, "bfloat16"):
        assert max(one["spilled_bytes"] for one in found.values()) <= 144


@pytest.mark.full
@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (128, "float16")])
def test_warp_groups_compile_at_the_ends_of_what_they_serve(width, dtype):
    """One row and one head, which are compiled in, one scale and eight, a ratio of 3, entries of a past; queries that
    turn alike for every scale.
    """
    found = compiled(90, width, dtype, "by warp groups")
    assert len(found) == 28
    check_counters(found)
    assert max(one["shared_bytes"] for one in found.values()) <= SHARED_BYTES[90]
    of_keys = {name for name in found if name.endswith("keys' gradients")}
    for name in found.keys() - of_keys:
        assert found[name]["spilled_bytes"] <= (80 if name.startswith("weighed") else 32), name
    # of a loader that divides by a ratio of 3, and of what is worked out of numbers that are compiled in
    assert max(found[name]["spilled_bytes"] for name in of_keys) <= 88
