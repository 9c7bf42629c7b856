"""How a request turns a model's thinking on or off, or up and down: by values that its chat template reads.

Templates have two kinds of such names. A switch is true or false (`enable_thinking` of Qwen3, `thinking` of DeepSeek
and Granite); `reasoning_effort` is a level, which harmony, the format of GPT-OSS, shows to the model. A level that a
template does not mention becomes the nearest of low, medium and high, which all of them know.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from domain.requests import Effort, GenerationRequest

SWITCHES: Final = ("enable_thinking", "thinking")

LEVEL: Final = "reasoning_effort"

_NEAREST: Final[dict[Effort, Effort]] = {"minimal": "low", "xhigh": "high", "max": "high"}


@dataclass(frozen=True, slots=True)
class ThinkingControls:
    """What the templates of a model read of all this. `words` are the strings that they mention."""

    switches: tuple[str, ...] = ()
    has_level: bool = False
    words: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Collection[str], words: Collection[str]) -> "ThinkingControls":
        """`names` are those that the templates read."""
        switches = tuple(name for name in SWITCHES if name in names)
        return cls(switches, LEVEL in names, frozenset(words))

    @property
    def can_switch_off(self) -> bool:
        return bool(self.switches) or (self.has_level and "none" in self.words)

    def takes(self, effort: Effort) -> bool:
        return self.can_switch_off if effort == "none" else self.has_level or bool(self.switches)

    def values_for(self, effort: Effort) -> dict[str, Any]:
        """What the templates get for an effort that they take."""
        values: dict[str, Any] = dict.fromkeys(self.switches, effort != "none")
        level = effort if effort in self.words else _NEAREST.get(effort, effort)
        if self.has_level and (level != "none" or "none" in self.words):
            values[LEVEL] = level
        return values


def asks_to_think(request: GenerationRequest) -> bool | None:
    """Whether the request turns thinking on or off; None leaves that to the template."""
    kwargs = request.chat_template_kwargs
    switched = next((kwargs[name] for name in SWITCHES if name in kwargs), None)
    if switched is not None:
        return bool(switched)
    effort = kwargs.get(LEVEL, request.reasoning_effort)
    return None if effort is None else effort != "none"
