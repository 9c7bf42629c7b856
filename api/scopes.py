"""Which scope of a key each private route needs. A route that is not in the table cannot be made."""

from collections.abc import Iterable

from domain.access import Scope

_READ = """
GET /v1/jobs
GET /v1/jobs/{job_id}
GET /v1/jobs/{job_id}/output
GET /v1/jobs/{job_id}/events
GET /v1/jobs/{job_id}/stream
HEAD /v1/jobs/{job_id}/stream
POST /v1/jobs/{job_id}/stream_token
GET /v1/dead_letters
GET /v1/chat/completions
GET /v1/chat/completions/{completion_id}
GET /v1/chat/completions/{completion_id}/messages
GET /v1/models
GET /v1/models/{model:path}
GET /v1/responses/{response_id:response_id}
GET /v1/responses/{response_id}/input_items
GET /v1/conversations/{conversation_id}
GET /v1/conversations/{conversation_id}/items
GET /v1/conversations/{conversation_id}/items/{item_id}
GET /v1/files
GET /v1/files/{file_id}
GET /v1/files/{file_id}/content
GET /v1/batches
GET /v1/batches/{batch_id}
GET /v1/messages/batches
GET /v1/messages/batches/{message_batch_id}
GET /v1/messages/batches/{message_batch_id}/results
GET /v1/webhook_event_types
GET /v1/webhook_endpoints
GET /v1/webhook_endpoints/{webhook_endpoint_id}
GET /v1/webhook_deliveries
GET /v1/webhook_deliveries/{delivery_id}
GET /v1/queue
GET /v1/usage
GET /v1/organization/usage/completions
GET /v1/organization/usage/embeddings
"""

_SUBMIT = """
POST /v1/jobs
POST /v1/jobs/{job_id}/retry
POST /v1/dead_letters/{job_id}/replay
POST /v1/chat/completions
POST /v1/chat/completions/{completion_id}
POST /v1/completions
POST /v1/embeddings
POST /v1/responses
POST /v1/responses/input_tokens
POST /v1/responses/compact
POST /v1/conversations
POST /v1/conversations/{conversation_id}
POST /v1/conversations/{conversation_id}/items
POST /v1/files
POST /v1/batches
POST /v1/messages
POST /v1/messages/count_tokens
POST /v1/messages/batches
POST /generate
POST /generate_stream
POST /chat
POST /api/v1/infer
POST /rerank
POST /v1/rerank
POST /v2/rerank
POST /score
POST /v1/score
POST /tokenize
POST /detokenize
POST /v1/webhook_endpoints
POST /v1/webhook_endpoints/{webhook_endpoint_id}
POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret
POST /v1/webhook_endpoints/{webhook_endpoint_id}/test
GET /v1/webhook_secret
POST /v1/webhook_secret/rotate_secret
POST /v1/webhook_deliveries/{delivery_id}/redeliver
"""

_CANCEL = """
POST /v1/jobs/{job_id}/cancel
DELETE /v1/jobs/{job_id}
DELETE /v1/chat/completions/{completion_id}
POST /v1/responses/{response_id}/cancel
DELETE /v1/responses/{response_id:response_id}
DELETE /v1/conversations/{conversation_id}
DELETE /v1/conversations/{conversation_id}/items/{item_id}
DELETE /v1/files/{file_id}
POST /v1/batches/{batch_id}/cancel
POST /v1/messages/batches/{message_batch_id}/cancel
DELETE /v1/messages/batches/{message_batch_id}
DELETE /v1/webhook_endpoints/{webhook_endpoint_id}
"""

_METRICS = """
GET /metrics
"""

_ADMIN = """
GET /v1/admin/models
GET /v1/admin/queue
GET /v1/admin/models/known
GET /v1/admin/models/pulls
POST /v1/admin/models/pulls
GET /v1/admin/models/pulls/{name}
POST /v1/admin/models/pulls/{name}/cancel
POST /v1/admin/models/{model:path}/load
POST /v1/admin/models/{model:path}/unload
POST /v1/admin/workers/{hostname}/drain
POST /v1/admin/workers/{hostname}/resume
GET /v1/admin/tenants
POST /v1/admin/tenants
GET /v1/admin/tenants/{tenant}
POST /v1/admin/tenants/{tenant}
DELETE /v1/admin/tenants/{tenant}
GET /v1/admin/tenants/{tenant}/erasures
POST /v1/admin/tenants/{tenant}/erasures
GET /v1/admin/tenants/{tenant}/erasures/{erasure_id}
GET /v1/admin/keys
POST /v1/admin/keys
GET /v1/admin/keys/{key_id}
POST /v1/admin/keys/{key_id}
DELETE /v1/admin/keys/{key_id}
POST /v1/admin/keys/{key_id}/rotate
GET /v1/admin/audit
"""

SCOPE_BY_ROUTE = {
    route: scope
    for scope, routes in {
        Scope.READ: _READ,
        Scope.SUBMIT: _SUBMIT,
        Scope.CANCEL: _CANCEL,
        Scope.METRICS: _METRICS,
        Scope.ADMIN: _ADMIN,
    }.items()
    for route in routes.split("\n")
    if route
}


def scope_of(methods: Iterable[str], path: str) -> Scope:
    """The scope that a key needs for the route. Raises ValueError if the table does not say."""
    scopes = {SCOPE_BY_ROUTE.get(f"{method} {path}") for method in methods}
    scope = scopes.pop() if len(scopes) == 1 else None
    if scope is None:
        raise ValueError(f"{', '.join(methods)} {path} has no scope; add it to the table in api/scopes.py")
    return scope
