"""The application as an object: what is shared by all of a process, and what ends with each."""

import gc
import weakref

from api.app import create_app
from api.openapi import document_of
from domain.catalog import Catalog
from settings import Settings


def test_an_application_that_is_let_go_is_gone() -> None:
    """FastAPI remembers every function it has called for a request; one that held its application would keep all of its
    routes in memory, 23,000 objects."""
    app = create_app(Settings(), Catalog([]))
    assert document_of(app)["paths"]
    ended = weakref.ref(app)
    del app
    gc.collect()
    assert ended() is None
