"""Turns a request into a complete one: checks it, tokenizes it, compiles its grammar. For live requests and lines of
batches."""

from uuid import UUID

from domain.embeddings import EmbeddingRequest
from domain.kinds import JobRequest
from domain.requests import GenerationRequest
from tasks.embed import refuse_unembeddable
from tasks.grammar_gate import GrammarGate
from tasks.models import ModelView, ModelViews
from tasks.settle import PreparedRequest, prepare_embedding, prepare_generation, refuse_ungenerable
from tasks.tokenizing import TokenizingPool


class RequestPreparer:
    """For one event loop. Holds the threads that tokenize and the processes that compile grammars."""

    def __init__(self, views: ModelViews) -> None:
        self._views = views
        self._tokenizing = TokenizingPool()
        self._grammar_gate = GrammarGate()

    def prepare_grammars(self) -> None:
        """Start preparing in the background what the models' grammars need. Call it again when models have changed."""
        self._grammar_gate.prepare(self._views.loaded())

    async def prepare(self, request: JobRequest, tenant_id: UUID) -> PreparedRequest:
        """Raises the CeleriacError that says why no job can be made of it."""
        view = self._views.get(request.model)
        refuse_unfit(request, view)
        if isinstance(request, EmbeddingRequest):
            return prepare_embedding(request, view, await self._tokenizing.encode_inputs(view, request))
        prepared = prepare_generation(request, view, await self._tokenizing.encode(view, request))
        if request.params.structured_output is not None:
            await self._grammar_gate.check(view, request.params.structured_output, tenant_id)
        return prepared

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Of a request that is not submitted. Raises the CeleriacError that says why it cannot be."""
        return len(await self._tokenizing.encode(self._views.get(request.model), request))

    async def aclose(self) -> None:
        self._tokenizing.close()
        await self._grammar_gate.aclose()


def refuse_unfit(request: JobRequest, view: ModelView) -> None:
    """What can be told before anything is tokenized. Raises UnsupportedParameter or InvalidRequest."""
    if isinstance(request, EmbeddingRequest):
        refuse_unembeddable(request, view)
    else:
        refuse_ungenerable(view)
