"""Reading YAML that people write, and checking it against a schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

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
            message = f"is no field of {schema.__name__}; known: " + ", ".join(schema.model_fields)
        raise InputError(message, file=path, field=field) from None
