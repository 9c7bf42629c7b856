"""/tokenize and /detokenize, in the form of vLLM's, and /ping and /version for load balancers and tools."""

from importlib.metadata import version
from typing import Annotated, ClassVar, Self

from fastapi import APIRouter
from pydantic import ConfigDict, Field, StringConstraints, model_validator
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.health import LiveView
from api.inputs import off_loop, read_for_model
from api.openapi import request_body
from api.services import Services, caller_of, private_router, services_of
from dialects.aliases import Alias, Aliases
from dialects.fields import HINT_TREE
from dialects.openai import OpenAIModel, build, publish_bounds
from dialects.openai_chat import ChatCompletionBody, Tool, to_generation_request
from dialects.openai_messages import Message
from dialects.openai_views import View
from domain.requests import MAX_MESSAGES, MAX_PROMPT_CHARS, MAX_PROMPT_TOKENS, GenerationRequest, TokenId
from domain.structured_output import MAX_TOOLS
from domain.template_kwargs import TemplateKwargs
from text.models import ModelView

public = APIRouter(tags=["Operations"])

router = private_router("Tokens")


class TokensBody(OpenAIModel):
    model_config = ConfigDict(json_schema_extra=publish_bounds)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]

    def view(self, services: Services) -> ModelView:
        """Raises ModelNotFound or ModelUnavailable."""
        return services.views.get(self.model)


class TokenizeBody(TokensBody):
    """A text, or the messages of a chat as /v1/chat/completions takes them."""

    ALIASES: ClassVar[Aliases] = {
        "add_special": Alias("add_special_tokens"),
        "content": Alias("prompt"),
        "with_pieces": Alias("return_token_strs"),
    }

    prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send exactly one of prompt and messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is true, but a chat template writes its special tokens; leave it out")
        return self

    def to_request(self, view: ModelView) -> GenerationRequest:
        """Raises InvalidRequest."""
        if self.messages is None:
            return build(GenerationRequest, {"model": view.spec.id, "prompt": self.prompt})
        chat = ChatCompletionBody.model_construct(
            model=view.spec.id,
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return to_generation_request(chat, view)


class TokenizeView(View):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Annotated[list[str] | None, Field(description="Only with return_token_strs.")]


class DetokenizeBody(TokensBody):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


class DetokenizeView(View):
    prompt: str


class VersionView(View):
    version: str


@router.post("/tokenize", responses={200: {"model": TokenizeView}}, openapi_extra=request_body(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """The tokens of a prompt, as a job with it would have them."""
    services, _ = caller_of(request)
    body = await read_for_model(request, TokenizeBody, HINT_TREE)
    view = body.view(services)
    if not body.prompt and body.messages is None:
        token_ids: list[int] = []
    elif body.add_special_tokens is False and body.prompt is not None:
        token_ids = await services.submitter.encode_text(view.spec.id, body.prompt)
    else:
        token_ids = await services.submitter.encode_prompt(await off_loop(request, body.to_request, view))
    names = await off_loop(request, _names, view, token_ids) if body.return_token_strs else None
    answer = {"count": len(token_ids), "max_model_len": view.max_model_len, "tokens": token_ids, "token_strs": names}
    return json_response(answer)


def _names(view: ModelView, token_ids: list[int]) -> list[str]:
    pieces = view.pieces(token_ids, skip_special_tokens=False)
    return [piece.name.decode(errors="replace") for piece in pieces]


@router.post("/detokenize", responses={200: {"model": DetokenizeView}}, openapi_extra=request_body(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    body = await read_for_model(request, DetokenizeBody, HINT_TREE)
    view = body.view(services_of(request))
    return json_response({"prompt": await off_loop(request, view.decode_checked, body.tokens)})


@public.get("/ping", responses={200: {"model": LiveView}})
@public.post("/ping", responses={200: {"model": LiveView}})
async def ping() -> Response:
    """200 as long as this process answers. Whether it can do anything is at /health."""
    return json_response({"status": "ok"})


@public.get("/version", responses={200: {"model": VersionView}})
async def show_version() -> Response:
    return json_response({"version": version("celeriac")})
