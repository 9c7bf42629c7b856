"""A sender in a process of its own, to be killed: python webhook_sender_process.py DATABASE_URL."""

import sys
import threading

from settings import Settings
from tests.webhook_receiver import SenderThread

SenderThread(Settings(database_url=sys.argv[1], webhook_private_targets=True)).start()
threading.Event().wait()
