"""/v1/admin: for admins only; the workers it lists are real."""

from typing import Any

import httpx
import pytest

from domain.access import Scope
from domain.catalog import Catalog
from domain.jobs import JobStatus, WorkerState
from gpu_worker.threads import RunnerEventKind
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until


def models_of(client: httpx.Client) -> list[dict[str, Any]]:
    return list(client.get("/v1/admin/models").json()["data"])


def test_every_model_is_listed_with_the_workers_that_serve_it(rig: Rig) -> None:
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        [model] = models_of(client)
        assert (model["id"], model["status"], model["workers"]) == ("test-model", "waiting", [])
        assert model["revision"] == "fake:main"
        wait_until(lambda: client.get("/v1/models/test-model").json()["loaded"] is False)
        worker = rig.start()
        wait_until(lambda: models_of(client)[0]["status"] == "loaded")
        wait_until(lambda: client.get("/v1/models").json()["data"][0]["loaded"])
        [seen] = models_of(client)[0]["workers"]
        assert (seen["hostname"], seen["max_num_seqs"], seen["state"]) == ("gpu@test", 8, "ready")
        wait_until(lambda: models_of(client)[0]["workers"][0]["cache_usage"] == 0, "its engine has reported")
        worker.runner.begin_drain(release_after_seconds=0)
        wait_until(lambda: models_of(client)[0]["status"] == "draining")


def test_an_unloaded_model_has_no_engine_until_it_is_loaded(rig: Rig) -> None:
    catalog = Catalog.load(rig.settings.models_file)
    worker = rig.start()
    with ApiServer(rig.settings, catalog) as server, server.client() as client:
        unloaded = client.post("/v1/admin/models/test-model/unload", headers={"prefer": "wait=20"})
        assert (unloaded.status_code, unloaded.headers["preference-applied"]) == (200, "wait=20")
        assert (unloaded.json()["is_loaded"], unloaded.json()["status"]) == (False, "unloaded")
        assert [seen["state"] for seen in unloaded.json()["workers"]] == ["unloaded"]
        with pytest.raises(AssertionError):
            _ = worker.engine_pid
        assert client.get("/health").json()["models_unloaded"] == ["test-model"]

        refused = client.post("/v1/completions", json={"model": "test-model", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
        accepted = client.post("/v1/jobs", json={"model": "test-model", "prompt": "x", "params": {"max_tokens": 4}})
        assert (accepted.status_code, accepted.json()["status"]) == (202, "queued")
        job_id = rig.add_job()
        worker.offer([job_id])
        worker.wait_for(RunnerEventKind.REFUSED, [job_id])
        assert rig.start(wait=False).runner.num_free == 0

        loaded = client.post("/v1/admin/models/test-model/load", headers={"prefer": "wait=20"})
        assert (loaded.status_code, loaded.json()["status"]) == (200, "loaded")
        assert [seen["state"] for seen in loaded.json()["workers"]] == ["ready", "ready"]
        wait_until(lambda: client.get(f"/v1/jobs/{accepted.json()['id']}").json()["status"] == "completed")
        wait_until(lambda: rig.job(job_id).status is JobStatus.COMPLETED)


def test_a_drained_worker_is_named_until_it_is_resumed(rig: Rig) -> None:
    worker = rig.start()
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        drained = client.post("/v1/admin/workers/gpu@test/drain")
        assert drained.status_code == 200
        since = drained.json()["drained_since"]
        wait_until(lambda: worker.runner.stats().state is WorkerState.DRAINING)
        wait_until(lambda: client.get("/health").json()["workers_drained_since"] == {"gpu@test": since})
        assert client.post("/v1/admin/workers/gpu@test/drain").json()["drained_since"] == since
        assert models_of(client)[0]["workers"][0]["drained_since"] == since
        job_id = rig.add_job()
        worker.offer([job_id])
        worker.wait_for(RunnerEventKind.REFUSED, [job_id])

        assert client.post("/v1/admin/workers/gpu@test/resume").json()["drained_since"] is None
        wait_until(lambda: worker.runner.stats().state is WorkerState.READY)
        worker.offer([job_id])
        worker.wait_for(RunnerEventKind.ENDED, [job_id])
        wait_until(lambda: client.get("/health").json()["workers_drained_since"] == {})

        unknown = client.post("/v1/admin/workers/nobody@nowhere/drain")
        assert unknown.status_code == 404
        assert "gpu@test" in unknown.json()["error"]["message"]


def test_an_order_is_kept_whoever_is_there_to_obey_it(rig: Rig) -> None:
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        first = client.post("/v1/admin/models/test-model/load", headers={"prefer": "wait=1"})
        assert (first.status_code, first.json()["status"]) == (202, "waiting")
        assert client.post("/v1/admin/models/test-model/unload").status_code == 202
        worker = rig.start(wait=False)
        wait_until(lambda: [seen["state"] for seen in models_of(client)[0]["workers"]] == ["unloaded"])
        assert worker.runner.stats().state is WorkerState.UNLOADED
        assert client.post("/v1/admin/models/nobody/elses/load").status_code == 404


def test_only_admin_keys_may_look_and_order(rig: Rig) -> None:
    with rig.sessions.begin() as session:
        plain = tenants.create_key(session, DEFAULT_TENANT_ID)
        admin = tenants.create_key(session, DEFAULT_TENANT_ID, scopes=Scope)
    settings = rig.settings.model_copy(update={"auth": "api_key"})
    with ApiServer(settings, Catalog.load(settings.models_file)) as server:
        for key, status in [(None, 401), (plain, 403), (admin, 200), (plain, 403)]:
            with server.client(key) as client:
                assert client.get("/v1/admin/models").status_code == status
                assert client.post("/v1/admin/models/test-model/load").status_code == (202 if key == admin else status)
        with server.client(plain) as client:
            assert client.get("/v1/admin/models").json()["error"]["code"] == "permission_denied"
            assert client.get("/v1/models").status_code == 200
