"""Flower behind the API's host and origin checks: `celery -A tasks.flower flower` instead of `-A tasks.app`.

Flower cancels jobs and stops workers. It checks the origin of its own POSTs, but not of reads, and not the host name. A
browser sends the password of FLOWER_BASIC_AUTH along whichever page asks, so origins matter there, too.
"""

import os
from typing import Any

from flower.app import Flower
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.web import Application, RequestHandler

from domain.addresses import Door
from settings import get_settings
from tasks.app import app, log_as_every_process_does

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
    door = Door(settings.allowed_host_names, settings.cors_origin_list)
    headers = {name.lower(): value for name, value in request.headers.items()}
    reason = door.refusal_of_page(request.method or "", headers)
    if reason is None and not os.environ.get("FLOWER_BASIC_AUTH"):  # a rebound name gets no password
        reason = door.refusal_of_host(headers)
    if reason is None:
        handler: HTTPMessageDelegate = Application.find_handler(flower, request, **options)
        return handler
    delegate: HTTPMessageDelegate = flower.get_handler_delegate(request, Refused, {"refusal": reason})
    return delegate


log_as_every_process_does()  # before Tornado sets up its own coloured logs
Flower.find_handler = find_handler
