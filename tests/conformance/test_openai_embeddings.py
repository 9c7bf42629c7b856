"""Embeddings through the unmodified SDK, made by a tiny BERT and by the embedded model in a real worker."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from gpu_worker import intake
from settings import ROOT
from tests.conformance.harness import Served
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import Rig
from tests.integration.test_engine_embedding import ENCODERS, reference, save, tiny_encoder
from tests.waiting import wait_until

MODEL = "test-model"
TEXTS = ["The fox told a tale.", "Moon", "a much longer line about the moon and the fox who told it everything"]


@pytest.fixture(scope="module", params=["bert", "celeriac-mini"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "celeriac-mini":
        return ROOT / "models" / "celeriac-mini"
    path = tmp_path_factory.mktemp("bert")
    save(tiny_encoder(ENCODERS["bert"]), path, "mean_tokens")
    return path


@pytest.fixture
def embedding(rig: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """An API and a worker with the model of `folder`."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    task = "generation" if folder.name == "celeriac-mini" else "embedding"
    lines = ["[[models]]", f'id = "{MODEL}"', f'path = "{folder}"', f'task = "{task}"', 'device = "cpu"']
    rig.settings.models_file.write_text("\n".join([*lines, "max_model_len = 128", "max_num_seqs = 4"]))
    with ApiServer(rig.settings, catalog=load(rig)) as server:
        worker = rig.start(wait=False)
        wait_until(lambda: worker.runner.stats().is_engine_ready, "the model is loaded")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            yield Served(server, rig, worker, client)


def load(rig: Rig) -> Any:
    from domain.catalog import Catalog

    return Catalog.load(rig.settings.models_file)


def test_every_form_of_input_gives_the_vectors_of_transformers(embedding: Served, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    torch.set_num_threads(1)
    pooling = "last" if folder.name == "celeriac-mini" else "mean"
    expected = reference(AutoModel.from_pretrained(folder).float().eval(), ids, pooling)
    create = embedding.client.embeddings.create
    answers = [create(model=MODEL, input=TEXTS), create(model=MODEL, input=ids)]
    answers.append(create(model=MODEL, input=TEXTS, encoding_format="float", user="me"))
    for answer in answers:
        assert (answer.object, answer.model) == ("list", MODEL)
        assert [item.index for item in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        for item, vector in zip(answer.data, expected, strict=True):
            np.testing.assert_allclose(item.embedding, vector, atol=1e-4)
    for one in (TEXTS[0], ids[0]):
        short = create(model=MODEL, input=one, dimensions=5).data[0].embedding
        np.testing.assert_allclose(short, expected[0][:5] / np.linalg.norm(expected[0][:5]), atol=1e-4)
    raw = httpx.post(
        f"{embedding.server.url}/v1/embeddings",
        json={"model": MODEL, "input": TEXTS[0], "encoding_format": "base64"},
        timeout=30,
    )
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4"), expected[0], atol=1e-4
    )
    assert embedding.client.get(f"/jobs/{raw.headers['x-job-id']}", cast_to=httpx.Response).status_code == 200
    if folder.name != "celeriac-mini":
        with pytest.raises(openai.BadRequestError, match="does not generate text") as refused:
            embedding.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [10**9]}, "input"),
        ({"input": "a", "dimensions": 100_000}, "dimensions"),
        ({"input": "a", "dimensions": 500}, "dimensions"),
        ({"input": "a", "extra_body": {"truncate": True}}, "truncate"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="fake", **fields)
    assert refused.value.param == param
