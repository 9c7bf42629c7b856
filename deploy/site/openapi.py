"""Prints the OpenAPI document of this checkout, for the reference on the site: `python -m deploy.site.openapi`."""

import json

from api.app import create_app
from api.openapi import document_of
from domain.catalog import Catalog, ModelSpec
from settings import Settings

if __name__ == "__main__":
    catalog = Catalog([ModelSpec(id="example", path="none", backend="fake", max_model_len=4096)])
    print(json.dumps(document_of(create_app(Settings(), catalog))))
