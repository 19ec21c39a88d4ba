"""ShareGPT: a JSON array of conversations, ``{"id", "conversations": [{"from": "human" | "gpt", "value"}]}``.

No arrivals and no lengths, only texts. As vLLM's own benchmark does, the first two turns of a conversation are taken as
prompt and output; conversations of fewer turns are passed over. Lengths are characters divided by ``CHARACTERS`` (an
assumption, and said to be one), or by another number with ``FILE#characters=3.5``, or counted by a Hugging Face
``tokenizer.json`` with ``FILE#tokenizer=PATH`` (needs the package ``tokenizers``).

One conversation is in memory at a time. vLLM drops short and long conversations besides; here they stay.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from profiles.errors import InputError, found
from replay.readers.fields import first_line
from replay.readers.opening import head, open_text
from replay.readers.workloads import workload_trace
from replay.trace import Trace

FORMAT = "sharegpt-json"
REQUESTS_FILE = ""
CHARACTERS = 4.0
"""Characters of a token of English text, roughly: OpenAI's rule of thumb."""
START = re.compile(r'\s*\[\s*\{(?=[^\[\]]{0,4000}"conversations"\s*:\s*\[)')
PIECE = 2**20
LONGEST = 2**24
"""Characters of one conversation."""
_SPACE = re.compile(r"[ \t\r\n]*")
Count = Callable[[str], int]


def detect(path: Path) -> bool:
    """Whether a file is of this format: an array whose first object has conversations."""
    return path.is_file() and START.match(head(path).decode("utf-8-sig", "replace")) is not None


def selections(path: Path) -> list[str]:
    """Names of the traces in a file: it holds one, whatever its tokens are counted by."""
    return []


def read(path: Path, selection: str | None = None) -> Trace:
    """Read a workload.

    Parameters
    ----------
    path : Path
    selection : str, optional
        ``characters=NUMBER`` or ``tokenizer=PATH``.

    Raises
    ------
    InputError
        Naming file, conversation and field of what cannot be used.
    """
    count, said = _counter(selection, path)
    ids: list[str] = []
    prompt, output = [], []
    passed = 0
    for number, one in enumerate(_elements(path), 1):
        turns = _turns(one, number, path)
        if turns is None:
            passed += 1
            continue
        prompt.append(count(turns[0]))
        output.append(count(turns[1]))
        ids.append(str(number))
    notes = ["the first two turns of each conversation are its prompt and its output, as vLLM's benchmark takes them"]
    if passed:
        notes.append(f"{passed:,} conversations of fewer than two turns are left out")
    return workload_trace(
        path,
        FORMAT,
        {
            "id": pa.array(ids, pa.string()),
            "prompt_tokens": np.array(prompt, np.int64),
            "output_tokens": np.array(output, np.int64),
        },
        {"id": "assumed: numbers of the conversations", "prompt_tokens": said, "output_tokens": said},
        clock=None,
        notes=notes,
    )


def _counter(selection: str | None, path: Path) -> tuple[Count, str]:
    """What counts the tokens of a text, and what to say of it."""
    kind, _, value = (selection or f"characters={CHARACTERS:g}").partition("=")
    if kind == "tokenizer" and value:
        return _tokenizer(Path(value)), f"reconstructed: counted with {Path(value).name}"
    try:
        each = float(value) if kind == "characters" else math.nan
    except ValueError:
        each = math.nan
    if not 0.1 <= each <= 100:
        raise InputError(
            f"#{selection}: expected #characters=NUMBER (of a token, 0.1 to 100) or #tokenizer=PATH", file=path
        )
    return lambda text: math.ceil(len(text) / each), f"assumed: a token for every {each:g} characters"


def _tokenizer(path: Path) -> Count:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "needs the package tokenizers (pip install servecal[tokenizers]); #characters=4 does without", file=path
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing more special
        raise InputError(f"is no tokenizer.json: {first_line(error)}", file=path) from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


class _Text:
    """A long text, of which only the part that is being parsed is in memory."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._place = stream, "", 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on, as much again as there is: so a long value is not parsed too often."""
        piece = self._stream.read(max(PIECE, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + piece, 0
        return bool(piece)

    def mark(self) -> str:
        """Return the next character that is no space, without passing it; empty at the end."""
        while True:
            self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def passed(self, mark: str) -> bool:
        """Pass a mark if it comes next."""
        if self.mark() != mark:
            return False
        self._place += 1
        return True

    def value(self) -> Any:
        """Return the next JSON value; raises ValueError or RecursionError where there is none."""
        self.mark()
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
                return value
            except json.JSONDecodeError:
                if len(self._text) - self._place > LONGEST or not self._more():
                    raise


def _elements(path: Path) -> Iterator[Any]:
    """Elements of a JSON array, one after the other."""
    number = 1
    try:
        with open_text(path) as stream:
            text = _Text(stream)
            if not text.passed("["):
                raise InputError("expected a JSON array", file=path)
            while not text.passed("]"):
                if number > 1 and not text.passed(","):
                    mark = text.mark()
                    reason = f"found {found(mark)}" if mark else "the file seems truncated"
                    raise _broken(path, number, f"expected ',' or ']': {reason}")
                yield text.value()
                number += 1
    except UnicodeDecodeError as error:
        raise _broken(path, number, f"is no UTF-8 text: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, number, f"is no JSON: {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=path) from None


def _turns(one: Any, number: int, path: Path) -> tuple[str, str] | None:
    """The texts of the first two turns, or None where there are fewer."""
    turns = one.get("conversations") if isinstance(one, dict) else None
    if not isinstance(turns, list):
        raise _broken(path, number, f"expected a list of turns, found {found(turns)}", "conversations")
    if len(turns) < 2:
        return None
    texts: list[Any] = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    for text in texts:
        if not isinstance(text, str):
            raise _broken(path, number, f"expected a text, found {found(text)}", "value")
    return texts[0], texts[1]


def _broken(path: Path, number: int, message: str, field: str | None = None) -> InputError:
    return InputError(message, file=path, row=f"conversation {number}", field=field)
