"""The API's torch-free view of a model: what a request becomes, what is refused, what a revision pins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from domain.catalog import ModelEntry
from domain.errors import InvalidRequest
from domain.requests import ChatMessage, GenerationRequest
from settings import ROOT
from text.model_files import model_revision
from text.models import ModelView, load_model_view

CHAT_TEMPLATE = (
    "{%- for message in messages %}\n"
    "{%- if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, *, begins_with: str | None = None, **tokenizer_config: object) -> Path:
    """A tiny byte-level BPE model folder as a hub repository would hold it, weights included. `begins_with` is the
    special token that tokenizer.json puts before a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat too"], trainer)
    if begins_with is not None:
        bos = (begins_with, tokenizer.token_to_id(begins_with))
        tokenizer.post_processor = TemplateProcessing(single=f"{begins_with} $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    return folder


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


def make_spec(folder: Path, **fields: object) -> ModelEntry:
    return ModelEntry.model_validate({"id": "tiny", "path": str(folder), "max_model_len": 64} | fields)


FAKE = ModelEntry(id="fake", path="fake", backend="fake", max_model_len=64)


def chat(*turns: tuple[str, str]) -> GenerationRequest:
    messages = tuple(ChatMessage.model_validate({"role": role, "content": content}) for role, content in turns)
    return GenerationRequest(model="tiny", messages=messages)


def rendered(view: ModelView, request: GenerationRequest) -> str:
    assert request.messages is not None
    return view.render(request.messages)


def test_messages_become_the_text_of_the_models_own_template(model_dir: Path) -> None:
    view = load_model_view(make_spec(model_dir))
    text = rendered(view, chat(("user", "the cat"), ("assistant", "sat"), ("user", "on")))
    assert text == "<|user|>the cat<|end|><|assistant|>sat<|end|><|user|>on<|end|><|assistant|>"


def test_the_specs_system_prompt_comes_first_unless_the_messages_bring_one(model_dir: Path) -> None:
    view = load_model_view(make_spec(model_dir, system_prompt="be brief"))
    assert rendered(view, chat(("user", "hi"))).startswith("<|system|>be brief<|end|><|user|>hi")
    assert "be brief" not in rendered(view, chat(("system", "be long"), ("user", "hi")))


def test_what_the_template_refuses_is_the_clients_error(model_dir: Path) -> None:
    view = load_model_view(make_spec(model_dir))
    with pytest.raises(InvalidRequest, match="no tools here") as caught:
        view.encode(chat(("tool", "42")))
    assert caught.value.param == "messages"


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    view = load_model_view(make_spec(write_model(tmp_path / "evil", chat_template=escape)))
    with pytest.raises(InvalidRequest, match="unsafe"):
        view.encode(chat(("user", "hi")))


def test_a_model_without_a_template_takes_prompts_only(tmp_path: Path) -> None:
    view = load_model_view(make_spec(write_model(tmp_path / "plain", chat_template=None)))
    assert view.encode(GenerationRequest(model="tiny", prompt="the cat"))
    with pytest.raises(InvalidRequest, match="send prompt instead"):
        view.encode(chat(("user", "hi")))


def test_a_template_file_beside_the_tokenizer_wins(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    assert rendered(load_model_view(make_spec(model_dir)), chat(("user", "hi"))) == "HI"


@pytest.mark.parametrize("text", ["NUL \0 inside", "emoji 🙂 and é", "\n\n  spaces  ", "\x1b[31m", "‮right to left"])
def test_odd_characters_are_tokens_like_any_other(model_dir: Path, text: str) -> None:
    view = load_model_view(make_spec(model_dir))
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.decode(view.encode(GenerationRequest(model="tiny", prompt=text))) == text


def test_defaults_come_from_the_generation_config(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [0, 1]}')
    defaults = load_model_view(make_spec(model_dir)).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 1.0, 20)


def test_a_model_that_asks_for_greedy_decoding_gets_it(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"do_sample": false}')
    assert load_model_view(make_spec(model_dir)).defaults.temperature == 0.0


def test_the_same_files_have_the_same_revision_wherever_they_lie(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    assert model_revision(make_spec(one)) == model_revision(make_spec(other))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_changes_the_revision(tmp_path: Path, name: str) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    content = (other / name).read_bytes() if (other / name).exists() else b"{}"
    (other / name).write_bytes(content[:-1] + b" ")
    assert model_revision(make_spec(one)) != model_revision(make_spec(other))


def test_files_that_are_no_part_of_the_model_leave_the_revision_alone(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    (other / "README.md").write_text("a card")
    assert model_revision(make_spec(one)) == model_revision(make_spec(other))


def test_a_folder_without_a_tokenizer_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model tiny: .* has no tokenizer\.json"):
        load_model_view(make_spec(tmp_path))


def test_a_fake_model_needs_no_files() -> None:
    view = load_model_view(FAKE)
    assert view.encode(GenerationRequest(model="fake", prompt="aé")) == [97, 195, 169]
    assert bytes(view.encode(chat(("user", "hi")))).decode() == "user: hi\nassistant: "


def test_token_ids_are_taken_as_they_are_within_the_vocabulary() -> None:
    view = load_model_view(FAKE)
    assert view.encode(GenerationRequest(model="fake", prompt_token_ids=(97, 256, 0))) == [97, 256, 0]
    with pytest.raises(InvalidRequest, match="257") as refused:
        view.encode(GenerationRequest(model="fake", prompt_token_ids=(97, 257)))
    assert refused.value.param == "prompt_token_ids"


def test_the_views_load_neither_torch_nor_transformers() -> None:
    code = "import sys, text.models; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def beyond_the_vocabulary(folder: Path, **fields: object) -> ModelView:
    """As Gemma's tokenizer has <image_soft_token>, which the model for text alone has not."""
    tokenizer = Tokenizer.from_file(str(write_model(folder) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size() - 1
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
    return load_model_view(make_spec(folder, **fields))


def test_a_text_that_spells_a_token_beyond_the_vocabulary_is_refused_by_its_name(tmp_path: Path) -> None:
    view = beyond_the_vocabulary(tmp_path / "tiny")
    with pytest.raises(InvalidRequest, match="prompt contains '<image_soft_token>'") as refused:
        view.encode(GenerationRequest(model="tiny", prompt="a <image_soft_token> b"))
    assert refused.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="<image_soft_token>") as refused:
        view.encode_input("<image_soft_token>", 3)
    assert refused.value.param == "inputs.3"


def test_in_a_message_it_is_text_unless_the_model_reads_its_tokens_there(tmp_path: Path) -> None:
    view = beyond_the_vocabulary(tmp_path / "tiny")
    assert max(view.encode(chat(("user", "a <image_soft_token> b")))) < view.vocab_size
    view = beyond_the_vocabulary(tmp_path / "other", special_tokens_in_content=True)
    with pytest.raises(InvalidRequest, match="messages contains '<image_soft_token>'") as refused:
        view.encode(chat(("user", "a <image_soft_token> b")))
    assert refused.value.param == "messages"
