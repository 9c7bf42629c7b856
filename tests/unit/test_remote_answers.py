"""What the remote back end makes of a server's answers, and when it asks again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from domain.catalog import Catalog, ModelEntry, RemoteOptions
from domain.errors import UnsupportedParameter
from domain.requests import GenerationRequest, SamplingParams
from gpu_worker.engine.remote import answers
from gpu_worker.engine.remote.answers import Delta, Fault, ScoredToken, ServerFailure, failure_of, read_delta
from gpu_worker.engine.remote.bodies import TextTokens, seed_at
from gpu_worker.engine.remote.gate import MAX_WAIT_SECONDS, Gate
from settings import ROOT
from tasks.prepare import resolve_params
from text.model_files import model_revision
from text.models import load_model_view

MINI = ROOT / "models" / "celeriac-mini"
AWAY = ServerFailure(Fault.AWAY, "it cannot be reached")
BUSY = ServerFailure(Fault.BUSY, "it answered 429")


def read_all(*pieces: bytes) -> list[bytes]:
    async def come() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def read() -> list[bytes]:
        return [data async for data in answers.read_events(come())]

    return asyncio.run(read())


def test_events_are_found_however_the_network_cuts_them() -> None:
    whole = b": comment\r\n\r\ndata: {1}\r\n\r\ndata:{2}\n\nevent: x\ndata: [DONE]\n\ndata: {3}\n\n"
    assert read_all(whole) == [b"{1}", b"{2}"]
    assert read_all(*(whole[place : place + 1] for place in range(len(whole)))) == [b"{1}", b"{2}"]


def test_an_endless_line_ends_the_request() -> None:
    with pytest.raises(ServerFailure, match="line"):
        read_all(b"data: ", *[b"x" * 1_000_000] * 5)


def test_a_chunk_brings_ids_text_and_logprobs_by_id() -> None:
    logprobs = {
        "tokens": ["token_id:7"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:9": -1.5, "token_id:7": -0.5, "odd": -9.0}],
    }
    data = orjson.dumps({"choices": [{"text": "a", "token_ids": [7], "logprobs": logprobs, "finish_reason": "stop"}]})
    assert read_delta(data) == Delta([7], "a", [ScoredToken(-0.5, ((7, -0.5), (9, -1.5)))], "stop")
    assert read_delta(b'{"choices": [], "usage": {}}') is None


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"choices": 1}',
        b'{"choices": [1]}',
        b'{"choices": [{"token_ids": ["7"]}]}',
        b'{"choices": [{"token_ids": [true]}]}',
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"logprobs": {"token_logprobs": [1, 2], "top_logprobs": [{}]}}]}',
    ],
)
def test_what_is_no_chunk_breaks_the_request_off(data: bytes) -> None:
    with pytest.raises(ServerFailure) as caught:
        read_delta(data)
    assert caught.value.fault is Fault.BROKEN


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        *[(status, Fault.REFUSED) for status in (400, 413, 422)],
        *[(status, Fault.BUSY) for status in (408, 429, 503, 529)],
        *[(status, Fault.AWAY) for status in (301, 401, 403, 404, 502, 504)],
        (500, Fault.BROKEN),
    ],
)
def test_a_status_says_whose_fault_it_is(status: int, fault: Fault) -> None:
    assert failure_of(status, b"", {}).fault is fault


def test_the_servers_words_are_bounded_and_kept_apart_from_ours() -> None:
    failure = failure_of(400, orjson.dumps({"error": {"message": "no\nsuch " + "x" * 1000}}), {})
    assert failure.what == "it answered 400"
    assert failure.quote.startswith("no such xxx")
    assert len(failure.quote) == answers.MAX_QUOTE_CHARS
    assert failure_of(422, b'{"detail": "bad"}', {}).message == "it answered 422: bad"
    assert failure_of(500, b"<html>", {}).message == "it answered 500"


@pytest.mark.parametrize(
    ("header", "seconds"), [("2.5", 2.5), ("1e9", 300.0), ("-1", None), ("soon", None), ("nan", None)]
)
def test_retry_after_is_bounded(header: str, seconds: float | None) -> None:
    assert failure_of(429, b"", {"retry-after": header}).retry_after_seconds == seconds


def test_an_error_within_the_stream_is_the_requests_fault_only_if_it_says_so() -> None:
    for code, fault in ((400, Fault.REFUSED), (429, Fault.BROKEN), (500, Fault.BROKEN), ("x", Fault.BROKEN)):
        with pytest.raises(ServerFailure) as caught:
            read_delta(orjson.dumps({"error": {"message": "m", "code": code}}))
        assert caught.value.fault is fault


def test_a_gate_lets_one_request_try_and_opens_when_it_is_accepted() -> None:
    gate = Gate()
    assert gate.room(0.0, num_under_way=9) is None
    assert gate.close(BUSY, 10.0, sent_at=9.0)
    assert gate.room(10.0, num_under_way=0) == 0
    assert gate.room(gate.opens_at, num_under_way=0) == 1
    assert gate.room(gate.opens_at, num_under_way=1) == 0
    gate.open()
    assert gate.room(11.0, num_under_way=9) is None


def test_a_gate_waits_longer_each_time_but_one_wave_of_failures_counts_once() -> None:
    gate, now = Gate(), 0.0
    waits = []
    for _ in range(12):
        gate.close(BUSY, now, sent_at=now)
        waits.append(gate.opens_at - now)
        assert not gate.close(BUSY, now + 0.01, sent_at=now - 0.01), "it was sent before"
        now = gate.opens_at
    assert waits[0] <= 0.5
    assert MAX_WAIT_SECONDS / 2 <= waits[-1] <= MAX_WAIT_SECONDS
    patient = ServerFailure(Fault.BUSY, "it answered 503", retry_after_seconds=60.0)
    gate.close(patient, now, sent_at=now)
    assert gate.opens_at == now + 60.0


def test_a_server_that_is_away_gets_no_request_before_it_answers_a_probe() -> None:
    gate = Gate()
    gate.close(AWAY, 0.0, sent_at=0.0)
    assert gate.room(1e9, num_under_way=0) == 0
    gate.note_answer(5.0)
    assert gate.room(5.0, num_under_way=0) == 1


def test_seeds_depend_on_job_sequence_and_position() -> None:
    seeds = {seed_at(seed, index, place) for seed in (-(2**63), 0, 2**63 - 1) for index in (0, 7) for place in (0, 9)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_text_becomes_tokens_of_exactly_its_bytes() -> None:
    tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    tokens = TextTokens(tokenizer)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    texts = ["Once upon", " a", "  time\n", "Hé 🙂", "e\u0301", "\u2581", "", *special]
    token_ids = [token_id for text in texts for token_id in tokens.encode(text)]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "".join(texts)


def test_a_character_without_tokens_is_replaced() -> None:
    vocabulary = {character: token_id for token_id, character in enumerate("abï¿½")}  # the last three are U+FFFD
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.decode(TextTokens(tokenizer).encode("a\x13b")) == "a\ufffdb"


def test_a_tokenizer_that_changes_text_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"\u2581a": 0}, []))
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="byte-level"):
        TextTokens(tokenizer)


# The entry


def entry(mode: str = "tokens", **fields: object) -> ModelEntry:
    remote = {"url": "http://127.0.0.1:8000/v1", "mode": mode}
    return ModelEntry.model_validate({"id": "m", "path": str(MINI), "backend": "remote", "remote": remote} | fields)


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host/v1", "http://", "http://me:secret@host/v1", "http://host/v1?secret"]
)
def test_an_address_that_is_none_or_has_a_secret_is_refused_without_showing_it(url: str, tmp_path: Path) -> None:
    table = f'[[models]]\nid = "m"\npath = "p"\nbackend = "remote"\n[models.remote]\nurl = "{url}"\n'
    (tmp_path / "models.toml").write_text(table)
    [reason] = Catalog.load(tmp_path / "models.toml").unavailable.values()
    assert "remote.url" in reason
    assert "secret" not in reason


def test_a_server_and_the_back_end_belong_together() -> None:
    with pytest.raises(ValueError, match="belong together"):
        ModelEntry(id="m", path="p", backend="remote")
    with pytest.raises(ValueError, match="belong together"):
        ModelEntry(id="m", path="p", remote=RemoteOptions(url="http://host/v1"))


def test_the_file_of_an_authority_lies_beside_the_catalogue(tmp_path: Path) -> None:
    server = '[models.remote]\nurl = "https://host/v1"\nca_file = "ours.pem"\n'
    (tmp_path / "models.toml").write_text(f'[[models]]\nid = "m"\npath = "p"\nbackend = "remote"\n{server}')
    remote = Catalog.load(tmp_path / "models.toml").get("m").remote
    assert remote is not None
    assert remote.ca_file == str(tmp_path / "ours.pem")


def test_another_model_at_the_server_is_another_revision() -> None:
    one = model_revision(entry())
    other = model_revision(entry(remote={"url": "http://127.0.0.1:8000/v1", "model": "other"}))
    elsewhere = model_revision(entry(remote={"url": "http://elsewhere/v1"}))
    assert one == elsewhere != other


@pytest.mark.parametrize(
    ("mode", "params"),
    [
        ("tokens", {"prompt_logprobs": 1}),
        ("tokens", {"bad_token_ids": [1]}),
        ("tokens", {"structured_output": {"regex": "a"}}),
        ("text", {"top_k": 5}),
        ("text", {"logprobs": 0}),
        ("text", {"ignore_eos": True}),
        ("text", {"logit_bias": {1: 2.0}}),
    ],
)
def test_a_parameter_that_the_server_lacks_is_refused_at_submit(mode: str, params: dict[str, object]) -> None:
    view = load_model_view(entry(mode))
    request = GenerationRequest(model="m", prompt="x", params=SamplingParams.model_validate(params))
    [name] = params
    with pytest.raises(UnsupportedParameter, match=f"params.{name} .*'remote'"):
        resolve_params(request, view, 3)


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_all_other_parameters_are_taken(mode: str) -> None:
    view = load_model_view(entry(mode))
    params = SamplingParams(n=2, temperature=0.5, top_p=0.9, stop=("x",), presence_penalty=1.0, seed=4)
    resolved = resolve_params(GenerationRequest(model="m", prompt="x", params=params), view, 3)
    assert resolved.temperature == 0.5
