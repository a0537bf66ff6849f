"""The configuration of a method or reward is the arguments of its function: their names, types and defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from opd.errors import UsageError
from opd.schedule import Schedule

Catalogue = Mapping[str, Callable[..., Any]]  # functions by the name that a recipe gives them
RESERVED: Final = ("name", "use", "weight", "args")  # a method's and a reward's own keys
_PREFIX: Final = "argument_"  # a field may not be called like an attribute of BaseModel (`copy`, `json`); an alias may


@dataclass(frozen=True)
class Arguments:
    """What a recipe may set of a function: everything after its first `given` arguments, which the caller gives."""

    function: Callable[..., Any]
    model: type[BaseModel]  # refuses every other key
    given: int = 0

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that a recipe may give."""
        return tuple(name.removeprefix(_PREFIX) for name in self.model.model_fields)

    @property
    def about(self) -> str:
        """The first line of the function's docs."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def check(self, written: Mapping[str, Any]) -> tuple[dict[str, Any], list[ErrorDetails]]:
        """The arguments with their defaults, as the function wants them; or nothing and what is wrong."""
        try:
            checked = self.model.model_validate_json(json.dumps(written), strict=True)
        except ValidationError as error:
            return {}, error.errors(include_url=False)
        return {name: getattr(checked, _PREFIX + name) for name in self.names}, []

    def build(self, values: Mapping[str, Any]) -> None:
        """Try the checked arguments together, where the function is called with nothing else."""
        if not self.given:
            self.function(**values)


@cache
def of(function: Callable[..., Any], given: int = 0) -> Arguments:
    """The arguments of a function. `UsageError` if they cannot be a configuration: `**any` would let a typo pass."""
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[given:]:
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            raise UsageError(
                f"`{function.__name__}` takes {parameter}, so a misspelt key would pass. Name its arguments."
            )
        if name in RESERVED:
            raise UsageError(
                f"`{function.__name__}` calls an argument `{name}`, a key with another meaning. Rename it."
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[_PREFIX + name] = (_annotation(function, parameter), Field(default, alias=name))
    config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return Arguments(function, create_model(function.__name__, __config__=config, **fields), given)


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type, with names looked up where the function was written; the return type may be unknown there."""
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except Exception as error:
        raise UsageError(
            f"`{function.__name__}` annotates `{parameter.name}` with {parameter.annotation}, which cannot be read "
            f"({error}). Import it where the function is, not only for type checkers."
        ) from None


def as_plain(value: Any) -> Any:
    """An argument as YAML can hold it, so that reading it back gives the same."""
    if isinstance(value, Schedule):
        return f"{value.kind}({value.start!r}, {value.end!r}, {value.steps})"
    if isinstance(value, Mapping):
        return {key: as_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(entry) for entry in value]
    return value
