"""What people do with LangChain. Asserts for itself."""

from importlib.metadata import version
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.conformance.programs import report

settings: Any = {"max_retries": 0, "max_tokens": 8}
model = ChatOpenAI(model="test-model", **settings)


@tool
def add(a: int) -> int:
    """Adds one."""
    return a + 1


def chat() -> None:
    answer = model.invoke("Hi")
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8


def streaming() -> None:
    chunks = list(model.stream("Hi"))
    assert len(chunks) > 2
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    assert "".join(str(chunk.content) for chunk in chunks)


def tool_call() -> None:
    caller = ChatOpenAI(model="by-hand", **settings).bind_tools([add])
    answer = caller.invoke("Hi")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", {"a": 1})]
    whole: Any = None
    for chunk in caller.stream("Hi"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("add", {"a": 1})]


def embeddings() -> None:
    """Given tokens, as LangChain does by itself, only where the model has OpenAI's tokenizer: text, then."""
    embedder = OpenAIEmbeddings(model="test-model", dimensions=4, check_embedding_ctx_length=False, max_retries=0)
    one, two = embedder.embed_documents(["One", "Two"])
    assert len(one) == len(two) == 4
    assert embedder.embed_query("One") == one


report.run([chat, streaming, tool_call, embeddings], version=version("langchain-openai"))
