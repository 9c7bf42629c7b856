"""Which requests may be answered from the response cache, and the key by which the same request is recognised."""

import hashlib

import orjson

from domain.job_options import JobOptions
from domain.requests import GenerationRequest, JobRequest
from settings import Settings
from tasks.prepare import PreparedRequest
from text.models import ModelView


def answer_key(
    request: JobRequest, options: JobOptions, view: ModelView, prepared: PreparedRequest, settings: Settings
) -> bytes | None:
    """None if the request must run. Requests with the same key have the same engine, model files, prompt tokens and
    parameters, after all defaults were filled in. Keys are compared within a tenant only."""
    if settings.response_cache == "off" or not view.spec.response_cache or options.use_cache is False:
        return None
    if not isinstance(request, GenerationRequest) or not isinstance(prepared.request, GenerationRequest):
        return None
    if view.spec.passes_messages or options.turn is not None:
        return None  # the prompt is not known here, or a conversation is to be continued
    is_greedy = prepared.request.params.temperature == 0
    is_seeded = settings.response_cache == "seeded" and request.params.seed is not None
    is_determined = (is_greedy and settings.response_cache != "asked") or is_seeded
    if not (is_determined or options.use_cache):
        return None
    # The seed does not matter to a greedy request. A drawn seed is not part of what was asked for.
    params = prepared.request.params.model_copy(update={"seed": None if is_greedy else request.params.seed})
    spec = view.spec
    asked: list[object] = [
        [spec.id, request.adapter, view.revision, spec.backend, spec.dtype, spec.quantization],
        list(prepared.prompt_token_ids),
        params.model_dump_json(),  # as text, since the order of a schema's properties is that of the output
    ]
    return hashlib.sha256(orjson.dumps(asked)).digest()
