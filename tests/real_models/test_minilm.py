"""all-MiniLM-L6-v2 through the whole system: its vectors are those of sentence-transformers' recipe."""

import base64

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel

from celeriac.store.store import ModelStore
from tests.real_models.conftest import VECTORS, Reference

pytestmark = pytest.mark.slow

TEXTS = [
    "How do I bake bread?",
    "Bread is made of flour, water, salt and yeast; it is kneaded, left to rise, and baked.",
    "The train to Oslo leaves at nine.",
]
TOLERANCE = 1e-5


def reference_vectors(reference: Reference, texts: list[str]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """The mean of the last hidden states of all tokens, at length one."""
    vectors = []
    for text in texts:
        inputs = reference.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            states = reference.model(**inputs).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy())
    return np.stack(vectors)


def test_vectors_are_those_of_the_reference(sdk: openai.OpenAI, store: ModelStore) -> None:
    answer = sdk.embeddings.create(model=VECTORS, input=TEXTS, encoding_format="base64")
    told = np.stack([np.frombuffer(base64.b64decode(str(item.embedding)), np.float32) for item in answer.data])
    with Reference(store.path(VECTORS), AutoModel) as reference:
        expected = reference_vectors(reference, TEXTS)
    assert told.shape == (3, 384)
    assert np.abs(told - expected).max() < TOLERANCE
    similarity = told @ told.T
    assert similarity[0, 1] > similarity[0, 2] + 0.3, "bread is nearer to bread than to trains"
