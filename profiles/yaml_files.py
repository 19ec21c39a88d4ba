"""Reading YAML that people write, and checking it against a schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from profiles.errors import InputError, found

Schema = TypeVar("Schema", bound=BaseModel)

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # a PyYAML built without libyaml: slower, else the same
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises
    ------
    InputError
        If the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    return parse_mapping(text, path)


def parse_mapping(text: str, path: Path) -> dict[str, Any]:
    """Return the mapping that YAML text holds, read from ``path``.

    Raises
    ------
    InputError
        If it is no YAML, or holds no mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"is no YAML: {problem}", file=path, row=mark.line + 1 if mark else None) from None
    except RecursionError:
        raise InputError("is no YAML for a profile: nested too deeply", file=path) from None
    if not isinstance(document, Mapping):
        raise InputError(f"expected a mapping at the top, found {found(document)}", file=path)
    return {str(key): value for key, value in document.items()}


def validate(schema: type[Schema], document: Mapping[str, Any], path: Path) -> Schema:
    """Check a mapping against a pydantic model.

    Raises
    ------
    InputError
        Naming the first field that does not fit, what was found and what was expected.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = f"{first['msg']}; found {found(first['input'])}"
        if first["type"] == "missing":
            message = "is missing"
        elif first["type"] == "extra_forbidden":
            message = "is no field here; known: " + (", ".join(_fields_beside(schema, first["loc"])) or "none")
        raise InputError(message, file=path, field=field) from None


def _fields_beside(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names that the schema knows at the place of a location's last part."""
    place: Any = schema
    for part in location[:-1]:
        own = _by_key(place).get(str(part), place)
        # Of ``X | None`` and ``dict[str, X]``, X; the keys of a dict lead no deeper.
        place = next((one for one in (own, *get_args(own)) if _by_key(one)), own)
    return list(_by_key(place))


def _by_key(place: Any) -> dict[str, Any]:
    """Type of each field by the key that YAML has for it."""
    if not (isinstance(place, type) and issubclass(place, BaseModel)):
        return {}
    return {field.alias or name: field.annotation for name, field in place.model_fields.items()}
