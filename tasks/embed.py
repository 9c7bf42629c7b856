"""An embedding request on its way in: its inputs counted, and refused where this model cannot take them."""

from collections.abc import Sequence

from domain.embeddings import MAX_INPUT_TOKENS, MAX_NUMBERS, EmbeddingRequest
from domain.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from tasks.models import ModelView


def refuse_unembeddable(request: EmbeddingRequest, view: ModelView) -> None:
    """What can be told before anything is tokenized."""
    if not view.spec.can_embed:
        raise UnsupportedParameter(
            f"{view.spec.id} makes no embeddings: its back end {view.spec.backend!r} shows no hidden states; "
            "choose another model",
            param="model",
        )
    width = view.embedding_width
    if request.dimensions is not None and request.dimensions > width:
        raise InvalidRequest(
            f"dimensions is {request.dimensions} but {view.spec.id} has {width}; lower it", param="dimensions"
        )
    num_numbers = len(request.inputs) * (request.dimensions or width)
    if num_numbers > MAX_NUMBERS:
        raise InvalidRequest(
            f"inputs come to {num_numbers} numbers, more than {MAX_NUMBERS} in one job; send fewer",
            param="inputs",
        )


def encode_inputs(request: EmbeddingRequest, view: ModelView) -> list[list[int]]:
    """The token ids of each input. Raises InvalidRequest or ContextLengthExceeded."""
    inputs = [view.encode_input(value, place) for place, value in enumerate(request.inputs)]
    _check_lengths([len(ids) for ids in inputs], view)
    return inputs


def _check_lengths(lengths: Sequence[int], view: ModelView) -> None:
    for place, length in enumerate(lengths):
        if not length:
            raise InvalidRequest(f"inputs.{place} comes to no token at all; send some text", param=f"inputs.{place}")
        if length > view.max_model_len:
            raise ContextLengthExceeded(
                f"inputs.{place} comes to {length} tokens but {view.spec.id} holds {view.max_model_len}; shorten it",
                param=f"inputs.{place}",
            )
    if sum(lengths) > MAX_INPUT_TOKENS:
        raise InvalidRequest(
            f"inputs come to {sum(lengths)} tokens, more than {MAX_INPUT_TOKENS} in one job; send fewer", param="inputs"
        )
