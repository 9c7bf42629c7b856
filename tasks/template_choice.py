"""Which chat template of a model renders a conversation: a model may have several, by name, as in transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from domain.catalog import ModelEntry
from domain.errors import InvalidRequest, UnsupportedParameter
from tasks.chat_templates import ChatTemplate
from tasks.model_files import read_json_file, read_text_file

DEFAULT, TOOL_USE = "default", "tool_use"


class TemplateChoice:
    """All chat templates of one model. Thread-safe."""

    def __init__(self, spec: ModelEntry, templates: Mapping[str, ChatTemplate]) -> None:
        """Raises ValueError where models.toml names a template that is not among them."""
        if spec.chat_template is not None and spec.chat_template not in templates:
            raise ValueError(
                f"model {spec.id}: chat_template is {spec.chat_template!r}, but its files hold "
                f"{_listed(templates)}; name one of them, or leave it out"
            )
        self._spec = spec
        self._templates = dict(templates)

    @property
    def text(self) -> str:
        """All that these templates may write."""
        return "\n".join(template.source for template in self._templates.values())

    def choose(self, *, has_tools: bool) -> ChatTemplate:
        """The one that models.toml names; else `tool_use` for a conversation with tools, where there is one; else
        `default`. Raises InvalidRequest or UnsupportedParameter."""
        if not self._templates:
            raise InvalidRequest(f"{self._spec.id} has no chat template; send prompt instead", param="messages")
        name = self._spec.chat_template or (TOOL_USE if has_tools and TOOL_USE in self._templates else DEFAULT)
        if name not in self._templates:
            raise InvalidRequest(
                f"{self._spec.id} has no default chat template but {_listed(self._templates)}; name one of them as its "
                "chat_template in models.toml, or send prompt instead",
                param="messages",
            )
        if has_tools and not self._templates[name].shows_tools:
            raise UnsupportedParameter(f"the chat template of {self._spec.id} has no tools; remove them", param="tools")
        return self._templates[name]


def load_templates(
    spec: ModelEntry, folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> TemplateChoice:
    """Raises ValueError that names the template that does not compile."""
    templates = {}
    for name, source in _read_sources(folder, tokenizer_config).items():
        try:
            templates[name] = ChatTemplate(source, special_tokens)
        except TemplateError as exc:
            raise ValueError(f"model {spec.id}: its chat template {name!r} does not compile: {exc}") from exc
    return TemplateChoice(spec, templates)


def _read_sources(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over tokenizer_config.json, and that over chat_template.json, where processors keep theirs."""
    sources = {file.stem: read_text_file(file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        sources[DEFAULT] = read_text_file(folder / "chat_template.jinja")
    if sources:
        return sources
    own = _by_name(tokenizer_config.get("chat_template"), "tokenizer_config.json")
    return own or _by_name(read_json_file(folder / "chat_template.json").get("chat_template"), "chat_template.json")


def _by_name(value: Any, file_name: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise ValueError(
            f"{file_name}: chat_template is neither a text nor a list of {{name, template}}; mend it, or remove it"
        )
    return value


def _listed(templates: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(map(repr, sorted(templates))) or "none"
