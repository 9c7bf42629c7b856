"""Models of servers that take messages as they are: what is refused or counted, and what answers look like."""

from typing import get_args

from domain.errors import UnsupportedParameter
from domain.requests import Effort, GenerationRequest
from text.outputs import OutputFormat, ReasoningFormat
from text.thinking import ThinkingControls

#: How `gpu_worker/engine/remote/chat.py` writes what a server has already taken apart.
PASSED_ON = OutputFormat("hermes", ReasoningFormat.TAGGED)

EVERY_EFFORT = ThinkingControls(has_level=True, words=frozenset(get_args(Effort)))


def text_to_count(request: GenerationRequest, model_id: str) -> str:
    """A text about as long as the prompt that the server will make. Raises UnsupportedParameter."""
    if request.messages is None or request.continue_final_message:
        raise UnsupportedParameter(
            f"{model_id} runs on a server that takes only whole messages; end with a message of the user",
            param="messages" if request.messages is not None else request.source,
        )
    if request.chat_template_kwargs:
        raise UnsupportedParameter(
            f"{model_id} runs on a server with a chat template of its own; leave out chat_template_kwargs",
            param="chat_template_kwargs",
        )
    texts = [message.content for message in request.messages]
    texts += [call.arguments for message in request.messages for call in message.tool_calls]
    texts += [tool.model_dump_json(exclude_none=True) for tool in request.tools]
    return "\n".join(texts)
