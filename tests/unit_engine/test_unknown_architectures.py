"""What transformers does not know is called by its name before an engine tries to load it."""

from pathlib import Path

import pytest

from tests.unit.test_catalog import change_config
from tests.unit.test_models import make_spec, write_model
from text.models import load_model_view


@pytest.mark.parametrize("model_type", ["llama9", "whisper_encoder_of_mine"])
def test_an_architecture_that_nobody_knows_is_called_by_its_name(tmp_path: Path, model_type: str) -> None:
    folder = write_model(tmp_path / "tiny")
    change_config(folder, model_type=model_type)
    with pytest.raises(
        ValueError, match=f"'{model_type}', which the installed transformers does not support"
    ) as refused:
        load_model_view(make_spec(folder))
    assert str(refused.value).startswith("model tiny: ")
    assert str(refused.value).count("model tiny") == 1
