"""Jobs, chunks and endings as the statements of `storage/jobs_sql.py` take them: one array per column."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
import psycopg
from psycopg.types.array import ListBinaryDumper

from domain.chunks import TokenChunk

if TYPE_CHECKING:
    from storage.jobs import ChunkCommit, Finalisation
    from storage.jobs_accept import NewJob


class Packed(list[Any]):
    """An array that travels in binary: as text, every quote in it is escaped by a regular expression, which costs more
    than all the rest of a statement's parameters."""


psycopg.adapters.register_dumper(Packed, ListBinaryDumper)


def of_new_jobs(new_jobs: "Sequence[NewJob]") -> dict[str, Any]:
    return {
        "ids": [job.id for job in new_jobs],
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "models": [job.request.model for job in new_jobs],
        "model_revisions": [job.model_revision for job in new_jobs],
        "priorities": [job.priority for job in new_jobs],
        "idempotency_keys": [job.idempotency_key for job in new_jobs],
        "request_hashes": Packed(job.request_hash for job in new_jobs),
        "max_failures": [job.max_failures for job in new_jobs],
        "start_timeouts": [job.start_timeout_seconds for job in new_jobs],
        "deadlines": [job.deadline_at for job in new_jobs],
        "run_timeouts": [job.run_timeout_seconds for job in new_jobs],
        "num_prompt_tokens": [len(job.prompt_token_ids) for job in new_jobs],
        "max_tokens": [job.max_tokens for job in new_jobs],
        "seeds": [job.seed for job in new_jobs],
        "costs": [job.cost for job in new_jobs],
        "metadata": Packed(json.dumps(job.metadata) for job in new_jobs),
        "result_ttls": [job.result_ttl_seconds for job in new_jobs],
        "requests": Packed(job.request.model_dump_json() for job in new_jobs),
        "webhook_urls": [job.webhook_url for job in new_jobs],
        "webhook_statuses": [job.webhook_url and "{" + ",".join(job.webhook_statuses) + "}" for job in new_jobs],
        "kinds": [job.request.kind for job in new_jobs],
        "input_lengths": [_int_array(job.input_lengths) for job in new_jobs],
        "endpoints": [job.endpoint.value for job in new_jobs],
        "are_stored": [job.is_stored for job in new_jobs],
        "endpoint_bodies": [job.endpoint_body for job in new_jobs],
        "prompt_token_ids": [_int_array(job.prompt_token_ids) for job in new_jobs],
        "fingerprints": Packed(job.fingerprint for job in new_jobs),
        "lanes": [job.lane.value for job in new_jobs],
        "retry_ofs": [job.retry_of for job in new_jobs],
        "request_ids": [job.request_id for job in new_jobs],
    }


def of_fingerprints(new_jobs: "Sequence[NewJob]") -> dict[str, Any]:
    """What tells whether a request is known as poison."""
    return {
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "fingerprints": Packed(job.fingerprint for job in new_jobs),
        "lanes": [job.lane.value for job in new_jobs],
    }


def _int_array(numbers: "Sequence[int] | None") -> str | None:
    """A tenth of the time that `str` takes of each: a long prompt has a hundred thousand of them."""
    return None if numbers is None else "{" + orjson.dumps(list(numbers))[1:-1].decode() + "}"


def of_names(new_jobs: "Sequence[NewJob]") -> dict[str, Any]:
    """What tells whether a job is there already."""
    return {
        "ids": [job.id for job in new_jobs],
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "idempotency_keys": [job.idempotency_key for job in new_jobs],
        "request_hashes": Packed(job.request_hash for job in new_jobs),
    }


def of_commits(commits: "Sequence[ChunkCommit]") -> dict[str, Any]:
    return {
        "ids": [commit.job_id for commit in commits],
        "attempts": [commit.attempt for commit in commits],
        "before": [commit.chunks[0].sequence_number - 1 for commit in commits],
        "after": [commit.chunks[-1].sequence_number for commit in commits],
        "num_tokens": [sum(len(chunk.token_ids) for chunk in commit.chunks) for commit in commits],
        "chunks": Packed(_json_array(commit.chunks) for commit in commits),
    }


def of_endings(finalisations: "Sequence[Finalisation]") -> dict[str, Any]:
    return {
        "ids": [ending.job_id for ending in finalisations],
        "attempts": [ending.attempt for ending in finalisations],
        "last": [ending.last_sequence_number for ending in finalisations],
        "statuses": [ending.status.value for ending in finalisations],
        "finish_reasons": [ending.finish_reason and ending.finish_reason.value for ending in finalisations],
        "errors": Packed(ending.error and ending.error.model_dump_json() for ending in finalisations),
        "error_codes": [ending.error and ending.error.code for ending in finalisations],
        "results": Packed(ending.result and ending.result.model_dump_json() for ending in finalisations),
    }


def _json_array(chunks: Sequence[TokenChunk]) -> str:
    return "[" + ",".join(chunk.model_dump_json(exclude_defaults=True) for chunk in chunks) + "]"


def first_of_each(new_jobs: "Sequence[NewJob]") -> list[int]:
    """The places of the jobs that are not the second of their id or idempotency key in this group."""
    seen: set[tuple[UUID, str] | UUID] = set()
    firsts = []
    for place, job in enumerate(new_jobs):
        names: set[tuple[UUID, str] | UUID] = {job.id}
        if job.idempotency_key is not None:
            names.add((job.tenant_id, job.idempotency_key))
        if seen.isdisjoint(names):
            firsts.append(place)
        seen |= names
    return firsts
