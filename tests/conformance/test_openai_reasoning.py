"""Reasoning tokens through the unmodified SDK, of tiny models that draw every token of a few alike: the number is that
of the tokens in SQL, decoded from the first one on until </think> is there, whoever asks and however often."""

import io
import json
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseStreamEvent
from tokenizers import AddedToken, Tokenizer, decoders, models

from domain.catalog import Catalog
from domain.jobs import parse_id
from gpu_worker import intake
from maintenance.batches import BatchWork
from storage import jobs
from tests.conformance.harness import MESSAGES, Served
from tests.engine_driver import tiny_llama_config, tiny_model
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until
from text.models import ModelViews

pytestmark = pytest.mark.slow

MODEL = "test-model"
END = "</think>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHAT: Any = "/v1/chat/completions"
#: The tag is three tokens, and open when the output begins; or it is one that is special, and stands at the beginning.
WORDS = {"opened": ["</", "think", ">", "a", " b", "é"], "tagged": [" a", " b"]}
TEMPLATES = {"opened": TEMPLATE + "<think>\n", "tagged": TEMPLATE + "{# <think> #}"}
HELD_BACK: Any = {"stop": [">+", "+"]}  # no token has a plus: the text lags behind and never stops


def make_tokenizer(kind: str) -> Tokenizer:
    words = WORDS[kind]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.decoder = decoders.Fuse()
    if kind == "tagged":
        tokenizer.add_special_tokens([AddedToken("<think>", special=True), AddedToken(END, special=True)])
    else:
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=["opened", "tagged"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / request.param
    tokenizer = make_tokenizer(request.param)
    vocab_size = tokenizer.get_vocab_size()
    model = tiny_model(tiny_llama_config(vocab_size=vocab_size, eos_token_id=None, max_position_embeddings=2048))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (path / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return path


@pytest.fixture
def thinking(rig: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """An API and a worker, which looks for jobs by itself, with the model of `folder`."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    lines = ["[[models]]", f'id = "{MODEL}"', f'path = "{folder}"', 'device = "cpu"', "max_model_len = 2048"]
    rig.settings.models_file.write_text("\n".join([*lines, "max_num_seqs = 8"]))
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server:
        worker = rig.start(wait=False)
        wait_until(lambda: worker.runner.stats().is_engine_ready, "the model is loaded")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            yield Served(server, rig, worker, client)


def counted(thinking: Served, kind: str, id_: str) -> list[int]:
    """Of each choice of this answer, by its tokens in SQL."""
    tokenizer = make_tokenizer(kind)
    token_ids: dict[int, list[int]] = {}
    for chunk in thinking.rig.chunks(parse_id(id_)):
        token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
    return [_count(tokenizer, kind, token_ids[index]) for index in sorted(token_ids)]


def _count(tokenizer: Tokenizer, kind: str, token_ids: list[int]) -> int:
    texts = [tokenizer.decode(token_ids[:n], skip_special_tokens=False) for n in range(1, len(token_ids) + 1)]
    if kind == "tagged" and not texts[-1].lstrip().startswith("<think>"):
        return 0
    return next((n for n, text in enumerate(texts, start=1) if END in text), len(token_ids))


def chat(**options: Any) -> dict[str, Any]:
    """With this seed the choices of the first model think for ever, for 20 tokens, and for 156."""
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 160, "n": 3, "seed": 5}
    return asked | options


def reasoning_of(answer: Any) -> int:
    """What the usage of a completion or a response says."""
    usage = answer.usage
    details = getattr(usage, "completion_tokens_details", None) or usage.output_tokens_details
    number = details.reasoning_tokens
    assert isinstance(number, int)
    return number


def run_batch(thinking: Served, body: dict[str, Any]) -> ChatCompletion:
    """The answer to a batch of one line."""
    settings, views = thinking.rig.settings, ModelViews(Catalog.load(thinking.rig.settings.models_file))
    work = BatchWork(thinking.rig.sessions, views, settings)
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": body}
    file = thinking.client.files.create(file=("in.jsonl", io.BytesIO(json.dumps(line).encode())), purpose="batch")
    batch = thinking.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

    def has_ended() -> bool:
        work.tick()
        with thinking.rig.sessions.begin() as session:
            dispatched = jobs.let_lines_in(session, MODEL, limit=8)
        thinking.worker.offer(dispatched)
        return thinking.client.batches.retrieve(batch.id).status == "completed"

    wait_until(has_ended, "the batch has ended")
    work.close()
    output_file_id = thinking.client.batches.retrieve(batch.id).output_file_id
    assert output_file_id is not None
    written = json.loads(thinking.client.files.content(output_file_id).text)
    return ChatCompletion.model_validate(written["response"]["body"])


def test_chat_says_the_same_whole_streamed_retrieved_and_in_a_batch(thinking: Served, folder: Path) -> None:
    chats = thinking.client.chat.completions
    whole = chats.create(**chat(store=True, extra_body=HELD_BACK))
    numbers = counted(thinking, folder.name, whole.id)
    assert len(set(numbers)) > 1
    assert 0 < sum(numbers) < 3 * 160
    reasonings = [choice.message.model_dump().get("reasoning_content") for choice in whole.choices]
    assert [number > 1 for number in numbers] == [bool(text) for text in reasonings]
    *_, last = chats.create(**chat(store=True, stream=True, stream_options={"include_usage": True}))
    assert counted(thinking, folder.name, last.id) == numbers
    answers = [whole, last, chats.retrieve(whole.id), chats.retrieve(last.id), run_batch(thinking, chat())]
    assert [reasoning_of(answer) for answer in answers] == [sum(numbers)] * 5
    plain = thinking.client.completions.create(model=MODEL, prompt="Hi", max_tokens=160, n=3, seed=5)
    assert reasoning_of(plain) == 0, "its text is not taken apart"


def last_response(stream: Iterable[ResponseStreamEvent]) -> Response:
    *_, last = stream
    assert last.type == "response.incomplete"
    return last.response


def test_a_response_says_the_same_whole_streamed_retrieved_and_in_the_background(
    thinking: Served, folder: Path
) -> None:
    responses = thinking.client.responses
    for seed in (5, 6, 9):
        asked: Any = {"model": MODEL, "input": "Hi", "max_output_tokens": 100, "extra_body": {"seed": seed}}
        answers = [responses.create(**asked), last_response(responses.create(**asked, stream=True))]
        background = responses.create(**asked, background=True)
        answers.append(last_response(responses.retrieve(background.id, stream=True)))
        answers += [responses.retrieve(answer.id) for answer in answers]
        assert [reasoning_of(answer) for answer in answers] == counted(thinking, folder.name, background.id) * 6


@pytest.mark.parametrize("folder", ["opened"], indirect=True)
def test_a_job_that_another_engine_ends_counts_what_the_first_one_saw(thinking: Served, folder: Path) -> None:
    """It is killed when one choice has left its reasoning, and the others have not."""
    chats = thinking.client.chat.completions
    asked = chat(max_tokens=600, store=True, stream=True, stream_options={"include_usage": True})
    stream = chats.create(**asked)
    job_id = parse_id(next(stream).id)
    thinking.rig.wait_for_tokens([job_id], at_least=3 * 40)
    thinking.worker.signal_engine(signal.SIGKILL)
    *_, last = stream
    numbers = counted(thinking, folder.name, last.id)
    assert numbers[0] > 160
    assert numbers[1:] == [20, 156]
    assert set(thinking.rig.attempts_of_chunks(job_id)) == {1, 2}
    told = [chunk.num_reasoning_tokens for chunk in thinking.rig.chunks(job_id) if chunk.num_reasoning_tokens]
    assert told[:2] == [20, 156]
    assert len(told) == len(set(told)), "each once"
    assert [reasoning_of(answer) for answer in (last, chats.retrieve(last.id))] == [sum(numbers)] * 2
