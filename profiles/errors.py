"""Bad input, said so that the person who gave it can mend it."""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """Something a user gave cannot be used.

    Parameters
    ----------
    message : str
        What was found and what was expected.
    file : path, optional
        Where.
    row : int or str, optional
        Line (1-based) or index in it.
    field : str, optional
        Name of the column, key or argument.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        row: int | str | None = None,
        field: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else Path(file)
        self.row = row
        self.field = field
        super().__init__(message)

    def __str__(self) -> str:
        where = [str(self.file)] if self.file is not None else []
        if self.row is not None:
            where.append(f"line {self.row}" if isinstance(self.row, int) else self.row)
        if self.field is not None:
            where.append(f"field {self.field!r}")
        return ": ".join([*where, self.message])


def found(value: object) -> str:
    """Show a foreign value in a message: its repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
