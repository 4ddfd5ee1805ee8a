"""Open registries: the `type:` key of a config file picks a registered config class.

A registered class is a frozen dataclass whose `build()` makes the module it describes. Exact keys only: a name that
is registered twice raises, an unknown one raises and names the nearest.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

ConfigClass = TypeVar("ConfigClass", bound=type)


def suggest(name: str, choices: list[str]) -> str:
    """Return a cure for an unknown `name`: the nearest of `choices`, and all of them."""
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    return f"{hint}(known: {', '.join(sorted(choices))})"


class UnknownNameError(KeyError):
    """A name that no registry entry has."""

    def __init__(self, kind: str, name: str, choices: list[str]) -> None:
        self.kind, self.name, self.choices = kind, name, choices
        super().__init__(
            f"unknown {kind} '{name}': {suggest(name, choices)}; if a plug-in registers it, run that first: "
            "`moe-vision --plugin FILE …`, `import_plugin(FILE)` in Python"
        )

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(Mapping[str, type]):
    """Config classes by their `type:` name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[ConfigClass], ConfigClass]:
        """Class decorator that adds a config class under `name`. Raises ValueError if the name is taken."""

        def decorate(cls: ConfigClass) -> ConfigClass:
            if name in self._classes:
                taken = self._classes[name]
                raise ValueError(
                    f"{self.kind} '{name}' is registered twice: by {taken.__module__}.{taken.__qualname__} "
                    f"and by {cls.__module__}.{cls.__qualname__}; rename one of them"
                )
            cls.type_name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            raise UnknownNameError(self.kind, name, list(self._classes))
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


EXPERTS = Registry("expert")
MIXERS = Registry("mixer")
ADAPTERS = Registry("adapter")
SELECTORS = Registry("selector")
SLICING = Registry("slicing policy")
