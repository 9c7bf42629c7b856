"""A tool call as a model writes it, a JSON object, read as it comes."""

import json
import re
from dataclasses import dataclass, field

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAX_HEAD_CHARS = 512


@dataclass(slots=True)
class ToolCallText:
    """Its name as soon as it is known, its arguments as they come."""

    text: str = ""
    name: str | None = None
    is_told: bool = False
    is_over: bool = False
    _num_scanned: int = 0
    _depth: int = 0
    _is_in_string: bool = False
    _is_escaped: bool = False
    _arguments_begin: int = -1  # once they come in order
    _num_passed_on: int = 0
    _closings: list[int] = field(default_factory=list)  # where values of the object itself ended
    _whole_arguments: str | None = None  # where they came before the name

    def feed(self, text: str) -> int:
        """How much of `text` belongs to it."""
        num_before = len(self.text)
        self.text += text
        end = self._scan()
        self.text = self.text[:end]
        if self.name is None and len(self.text) <= _MAX_HEAD_CHARS + len(text) and (head := _HEAD.match(self.text)):
            self.name, self._arguments_begin = json.loads(head[1]), head.end()
        if self.is_over and self.name is None:
            self._read_whole()
        return end - num_before

    def take_arguments(self) -> str:
        if self._whole_arguments is not None:
            whole, self._whole_arguments = self._whole_arguments, ""
            return whole
        if self._arguments_begin < 0:
            return ""
        end = next((place for place in self._closings if place > self._arguments_begin), len(self.text))
        arguments = self.text[self._arguments_begin + self._num_passed_on : end]
        self._num_passed_on += len(arguments)
        return arguments

    def _scan(self) -> int:
        """Where the object ends, or the text."""
        for place in range(self._num_scanned, len(self.text)):
            character = self.text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._closings.append(place + 1)
                if self._depth == 0:
                    self.is_over = True
                    self._num_scanned = place + 1
                    return place + 1
        self._num_scanned = len(self.text)
        return len(self.text)

    def _read_whole(self) -> None:
        try:
            call = json.loads(self.text)
        except ValueError:
            return
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if arguments is None or not isinstance(call.get("name"), str):
            return
        self.name = call["name"]
        self._whole_arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
