"""Settings of a run, as dataclasses: names are flags, docstrings their help; each group checks its ranges."""

from __future__ import annotations

from ...errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def at_least(low: int, **settings: float | None) -> None:
    """Raises ConfigError for a setting below `low`, naming its flag; None passes."""
    for name, value in settings.items():
        require(value is None or value >= low, f"{flag(name)} {value}: expected at least {low}")


def positive(**settings: float | None) -> None:
    """Raises ConfigError for a setting that is not above 0, naming its flag; None passes."""
    for name, value in settings.items():
        require(value is None or value > 0, f"{flag(name)} {value}: expected a positive number")


def fraction(**settings: float) -> None:
    """Raises ConfigError for a setting outside of [0, 1), naming its flag."""
    for name, value in settings.items():
        require(0 <= value < 1, f"{flag(name)} {value}: expected a number in [0, 1)")


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"
