"""Embedding jobs through the real worker: one result each, whatever happens to the engine meanwhile."""

import base64
import signal
from uuid import UUID

import numpy as np

from domain.jobs import JobStatus
from domain.requests import EmbeddingResult
from gpu_worker.engine.fake_tokens import fake_vector
from gpu_worker.threads import RunnerEventKind
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until

INPUTS = [[n % 200, n // 200, 7] for n in range(150)]


def assert_embedded(rig: Rig, job_id: UUID, inputs: list[list[int]], dimensions: int = 8) -> None:
    job, result = rig.job(job_id), rig.output(job_id)
    assert (job.status, job.committed_sequence_number, job.finish_reason) == (JobStatus.COMPLETED, 0, None)
    assert isinstance(result, EmbeddingResult)
    assert result.dimensions == dimensions
    assert result.usage.prompt_tokens == sum(map(len, inputs))
    for embedding, token_ids in zip(result.embeddings, inputs, strict=True):
        front = np.array(fake_vector(token_ids)[:dimensions])
        actual = np.frombuffer(base64.b64decode(embedding), "<f4")
        np.testing.assert_allclose(actual, front / np.linalg.norm(front), rtol=1e-5)


def test_vectors_are_made_beside_texts(rig: Rig) -> None:
    embeddings = [rig.add_embedding(INPUTS), rig.add_embedding([[5]], dimensions=3)]
    texts = rig.add_jobs(4)
    worker = rig.start()
    worker.offer([*embeddings, *texts])
    worker.wait_for(RunnerEventKind.ENDED, [*embeddings, *texts])
    assert_embedded(rig, embeddings[0], INPUTS)
    assert_embedded(rig, embeddings[1], [[5]], dimensions=3)
    for job_id in texts:
        rig.assert_intact(job_id)
    assert rig.chunks(embeddings[0]) == []


def test_an_engine_killed_in_the_middle_costs_a_second_attempt_and_no_more(rig: Rig) -> None:
    rig.write_catalog(step_seconds=0.1)
    job_id = rig.add_embedding(INPUTS * 10)  # nine steps
    worker = rig.start()
    worker.offer([job_id])
    wait_until(lambda: rig.job(job_id).status is JobStatus.IN_PROGRESS, "it runs")
    worker.signal_engine(signal.SIGKILL)
    worker.wait_for(RunnerEventKind.RELEASED, [job_id])
    worker.wait_until_ready()
    worker.offer([job_id])
    worker.wait_for(RunnerEventKind.ENDED, [job_id])
    assert rig.job(job_id).attempt == 2
    assert_embedded(rig, job_id, INPUTS * 10)


def test_a_cancelled_job_ends_without_a_result(rig: Rig) -> None:
    rig.write_catalog(step_seconds=0.5)
    job_id = rig.add_embedding(INPUTS * 10)
    worker = rig.start()
    worker.offer([job_id])
    worker.wait_for(RunnerEventKind.CLAIMED, [job_id])
    worker.runner.cancel(job_id)
    worker.wait_for(RunnerEventKind.ENDED, [job_id])
    assert rig.job(job_id).status is JobStatus.CANCELLED
    assert rig.chunks(job_id) == []
