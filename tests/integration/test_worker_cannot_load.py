"""`celeriac worker` with a model that cannot be loaded: one try, a last line that says why, an exit code of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from domain.errors import CeleriacError
from domain.jobs import JobStatus
from gpu_worker.pool import served_models
from storage import troubles
from tests.engine_driver import tiny_llama_config, tiny_model
from tests.engine_parts import TOKENIZER
from tests.integration.consumer_harness import ROOT
from tests.integration.runner_harness import MODEL, Rig
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def spoil_nothing(folder: Path) -> None:
    """The entry is what is wrong."""


def corrupt_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def leave_a_layer_out(folder: Path) -> None:
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}
    save_file(kept, path, metadata={"format": "pt"})


def widen_a_layer(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(len(tensors["model.norm.weight"]) + 1)
    save_file(tensors, path, metadata={"format": "pt"})


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unheard"}}')


def take_the_folder_away(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model(tiny_llama_config(tie_word_embeddings=True)).save_pretrained(folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


CANNOT_LOAD = {
    "too long": (spoil_nothing, "max_model_len = 512", "supports 256 positions; lower it"),
    "no such device": (spoil_nothing, 'device = "cuda"', "CUDA"),
    "an entry that makes no sense": (spoil_nothing, "kv_cache_tokens = 16", "kv_cache_tokens is 16"),
    "corrupt weights": (corrupt_the_weights, "", "SafetensorError"),
    "cut weights": (cut_the_weights, "", "SafetensorError"),
    "missing weights": (leave_a_layer_out, "", "9 weights are missing, including model.layers.1."),
    "weights that do not fit": (widen_a_layer, "", "model.norm.weight has shape"),
    "a tokenizer that cannot be read": (break_the_tokenizer, "", "its tokenizer cannot be read: "),
    "no folder": (take_the_folder_away, "", "is not a folder on this machine; correct it"),
}


@pytest.fixture
def reason(rig: Rig, model_folder: Path, case: str) -> str:
    """The model is in the catalog, and cannot be loaded for this reason."""
    if case == "no such device" and torch.cuda.is_available():
        pytest.skip("there is one")
    spoil, entry, reason = CANNOT_LOAD[case]
    spoil(model_folder)
    length = "" if "max_model_len" in entry else "max_model_len = 128"
    rig.settings.models_file.write_text(
        f'[[models]]\nid = "{MODEL}"\npath = "{model_folder}"\nmax_num_seqs = 2\n{length}\n{entry}\n'
    )
    return reason


@pytest.mark.parametrize("case", CANNOT_LOAD)
def test_a_model_that_cannot_be_loaded_is_given_up_with_the_reason(rig: Rig, reason: str) -> None:
    job_id = rig.add_job()
    said = give_up(rig)
    assert MODEL in said
    assert reason in said
    assert len(said) < 1000
    assert len(said.splitlines()) == 1
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == (JobStatus.QUEUED, 0)


def give_up(rig: Rig) -> str:
    """What a worker says of the model before it starts or, if it started, when its engine could not."""
    try:
        served_models(rig.settings)
    except (CeleriacError, OSError, ValueError) as exc:
        return str(exc)
    worker = rig.start(wait=False)
    wait_until(lambda: worker.unhealthy, "the worker gives up")
    (failure,) = worker.unhealthy
    assert failure.is_lasting, "it is not tried again"
    return failure.reason


@pytest.mark.parametrize("case", ["an entry that makes no sense", "missing weights"])
def test_a_model_that_cannot_be_loaded_ends_the_worker_with_the_reason(rig: Rig, reason: str) -> None:
    """As a process: found before its start, and by its engine."""
    job_id = rig.add_job()
    done = subprocess.run(
        [sys.executable, "-m", "celeriac", "worker"],
        cwd=ROOT,
        env=os.environ
        | {
            "CELERIAC_DATABASE_URL": rig.settings.database_url,
            "CELERIAC_REDIS_URL": rig.settings.redis_url,
            "CELERIAC_MODELS_FILE": str(rig.settings.models_file),
            "CELERIAC_LOG_FORMAT": "json",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == os.EX_CONFIG, done.stderr
    assert done.stderr.count("loading model") <= 1, "it is not tried again"
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "CRITICAL"
    assert MODEL in last["message"]
    assert reason in last["message"]
    assert len(last["message"]) < 1000
    assert "Traceback" not in done.stdout + done.stderr
    with rig.sessions() as session:  # where /health and doctor find it
        assert [reason in told.words for told in troubles.told_troubles(session)] == [True]
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == (JobStatus.QUEUED, 0)
