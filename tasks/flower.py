"""Flower behind the API's host and origin checks: `celery -A tasks.flower flower` instead of `-A tasks.app`.

Flower can cancel jobs and stop workers. It checks the origin of its own POSTs, but neither that of reads nor the host
name. A browser sends the password of FLOWER_BASIC_AUTH with the requests of any page, so with a password origins still
matter.
"""

import os
from typing import Any

from flower.app import Flower
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.web import Application, RequestHandler

from domain.addresses import OriginPolicy
from settings import get_settings
from tasks.app import app, use_our_logging

__all__ = ["app"]


class Refused(RequestHandler):
    def initialize(self, refusal: str) -> None:
        self._refusal = refusal

    def prepare(self) -> None:
        self.set_status(403)
        self.finish({"error": {"message": self._refusal, "type": "permission_error", "code": "permission_denied"}})


def find_handler(flower: Flower, request: HTTPServerRequest, **options: Any) -> HTTPMessageDelegate:
    """Tornado calls this for every request, before any of Flower's routes."""
    settings = get_settings()
    policy = OriginPolicy(settings.allowed_host_names, settings.cors_origin_list)
    headers = {name.lower(): value for name, value in request.headers.items()}
    reason = policy.refusal_of_page(request.method or "", headers)
    if reason is None and not os.environ.get(
        "FLOWER_BASIC_AUTH"
    ):  # with a password, DNS rebinding gains nothing: browsers send it to no other name
        reason = policy.refusal_of_host(headers)
    if reason is None:
        handler: HTTPMessageDelegate = Application.find_handler(flower, request, **options)
        return handler
    delegate: HTTPMessageDelegate = flower.get_handler_delegate(request, Refused, {"refusal": reason})
    return delegate


use_our_logging()  # before Tornado sets up its own coloured logs
Flower.find_handler = find_handler
