"""/v1/responses/compact: a conversation summarised by its model, and sealed for the client to keep."""

from starlette.requests import Request
from starlette.responses import Response

from api.inputs import off_loop, read_for_model
from api.openai.answers import WholeAnswer
from api.openai.item_references import with_referenced_items
from api.openai.responses import context_of_request, with_opened_input
from api.openai.running import Asked, start
from api.openapi import request_body
from api.services import caller_of, private_router
from dialects.fields import HINT_TREE
from dialects.openai_compaction import SPELLING, CompactBody, CompactedView, compacted, to_summary_request
from domain.jobs import Endpoint
from storage import tenants
from text.parsers import parser_of

router = private_router("OpenAI")


@router.post(
    "/v1/responses/compact", responses={200: {"model": CompactedView}}, openapi_extra=request_body(CompactBody)
)
async def compact(request: Request) -> Response:
    """Shorten a conversation: the user's messages as they are, and one item with a summary of everything, which the
    model has written. Send these back in place of the conversation."""
    services, tenant_id = caller_of(request)
    body = await with_referenced_items(request, await read_for_model(request, CompactBody, HINT_TREE))
    view = services.views.get(body.model)
    opened = await with_opened_input(request, body)
    context, _ = await context_of_request(services, tenant_id, body)
    generation = await off_loop(request, to_summary_request, opened, view, context)
    key = await services.read(tenants.seal_key, tenant_id)
    asked = Asked(endpoint=Endpoint.RESPONSES, has_stream=False, spelling=SPELLING)
    run = await start(request, generation, asked)
    parser = parser_of(generation, view.output_format)
    return WholeAnswer([run], lambda records: compacted(records[0], body, parser, key))
