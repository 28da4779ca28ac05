"""Permission to run the code that a configuration names. Torch-free, and it imports nothing of that code.

A configuration travels: inside checkpoints, records and other people's files. So the name in maha.program is never
enough to run it; the command line of this very run has to give the same name by --allow-program.
"""

from maha_megatron.config.derive import uses_maha
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError

OPTION = "--allow-program"
OPTION_HELP = "run the code that the configuration's maha.program names; read it first. Nothing else permits it"


def allowed_program(config: Config, allowed: str | None) -> str | None:
    """The module:function that a configuration needs and the command line allows; None where it needs none.

    Args:
        config: of a file or of a checkpoint.
        allowed: what the command line gave as --allow-program.

    Raises:
        ConfigError: the two do not name the same; an allowance without effect is refused as well.
    """
    if not states_program(config):
        if allowed is not None:
            raise ConfigError(f"{OPTION} {allowed}: no effect, since no layer has maha.aggregation: program; remove it")
        return None
    name = config.maha.program
    if not name:
        raise ConfigError("maha.aggregation: program needs maha.program: module:function, which states it")
    if allowed is None:
        raise ConfigError(
            f"maha.program: {name} is code that would run here; a configuration alone, or a checkpoint, does not "
            f"permit that. Read it, then add {OPTION} {name}"
        )
    if allowed != name:
        raise ConfigError(f"{OPTION} {allowed} is not what maha.program names: {name}; give the one you mean in both")
    return name


def states_program(config: Config) -> bool:
    """Whether building this model runs code that the configuration names."""
    return config.maha.aggregation == "program" and uses_maha(config)
