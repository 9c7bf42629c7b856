"""Maintenance in a hurry, and with a fault in one of its clocks, or with "none" of them:
python -m tests.integration.faulty_maintenance FAULT maintenance. What it waits for takes a tenth of the usual time.
"""

import sys
import threading

import maintenance.process
import maintenance.webhooks
from celeriac import cli
from maintenance.batches import BatchWork
from maintenance.webhooks import WebhookSender


class Hanging(BatchWork):
    """Its first look at batches never ends."""

    def tick(self) -> bool:
        return threading.Event().wait()


class Failing(BatchWork):
    def tick(self) -> bool:
        raise ArithmeticError("batches cannot be looked at")


class Panicking(BatchWork):
    """As a library in Rust that panics: not even an Exception."""

    def tick(self) -> bool:
        raise BaseException("a panic")


class DyingSender(WebhookSender):
    async def run(self) -> None:
        raise ArithmeticError("webhooks cannot be sent")


FAULTS: dict[str, tuple[str, type]] = {
    "batches hang": ("BatchWork", Hanging),
    "batches fail": ("BatchWork", Failing),
    "batches panic": ("BatchWork", Panicking),
    "webhooks die": ("WebhookSender", DyingSender),
    "none": ("WebhookSender", WebhookSender),
}
for module, name in (
    (maintenance.webhooks, "POLL_SECONDS"),
    (maintenance.process, "TELL_SECONDS"),
    (maintenance.process, "PAUSE_SECONDS"),
    (maintenance.process, "STOP_SECONDS"),
):
    setattr(module, name, getattr(module, name) / 10)
setattr(maintenance.process, *FAULTS[sys.argv.pop(1)])
cli.main()
