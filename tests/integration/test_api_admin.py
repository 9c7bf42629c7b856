"""/v1/admin: for admins only; the workers it lists are real."""

from typing import Any

import httpx

from domain.catalog import Catalog
from storage import api_keys
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import ApiServer, until
from tests.integration.runner_harness import Rig


def models_of(client: httpx.Client) -> list[dict[str, Any]]:
    return list(client.get("/v1/admin/models").json()["data"])


def test_every_model_is_listed_with_the_workers_that_serve_it(rig: Rig) -> None:
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        [model] = models_of(client)
        assert (model["id"], model["status"], model["workers"]) == ("test-model", "waiting", [])
        assert model["revision"] == "fake:main"
        worker = rig.start()
        until(lambda: models_of(client)[0]["status"] == "loaded")
        [seen] = models_of(client)[0]["workers"]
        assert (seen["hostname"], seen["max_num_seqs"], seen["draining"]) == ("gpu@test", 8, False)
        worker.runner.begin_drain(release_after_seconds=0)
        until(lambda: models_of(client)[0]["status"] == "draining")


def test_only_admin_keys_may_look(rig: Rig) -> None:
    with rig.sessions.begin() as session:
        plain = api_keys.create(session, DEFAULT_TENANT_ID)
        admin = api_keys.create(session, DEFAULT_TENANT_ID, is_admin=True)
    settings = rig.settings.model_copy(update={"auth": "api_key"})
    with ApiServer(settings, Catalog.load(settings.models_file)) as server:
        for key, status in [(None, 401), (plain, 403), (admin, 200), (plain, 403)]:
            with server.client(key) as client:
                assert client.get("/v1/admin/models").status_code == status
        with server.client(plain) as client:
            assert client.get("/v1/admin/models").json()["error"]["code"] == "permission_denied"
            assert client.get("/v1/models").status_code == 200
