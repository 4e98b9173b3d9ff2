"""Names of `utils.general` that are made on demand: importing it sets up no logger."""

from __future__ import annotations

from typing import Any

from utils.compat.environment import script_logger, user_config_dir

ON_DEMAND = {"utils.general": {"CONFIG_DIR": user_config_dir, "LOGGER": script_logger}}


def look_up(module: str, name: str) -> Any:
    """Returns a module's name that is made on demand.

    Raises:
        AttributeError: any other name.
    """
    make = ON_DEMAND[module].get(name)
    if make is None:
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    return make()
