"""What the clients of a chaos run ask for, and how each of them behaves."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from tests.chaos.clients import Clients, History, How
from tests.chaos.faults import Fault

FAKE_MODEL, REAL_MODEL = "fake", "celeriac-mini"
POISON_SEED = 666
POISON_CHANCE = 1 / 1000
REAL_CHANCE = 1 / 20
MIN_RECONNECTS = 3
HOWS: tuple[How, ...] = ("start", "last-event-id", "starting-after", "snapshot")
SHARES = ((0.05, 0.3), (0.15, 0.6), (0.25, 1.0))  # of the most tokens, that a job may take at least and at most
REAL_PROMPTS = ("Once upon a time", "The capital of France is", "47+38=", "There was a little boat", "A cat and a dog")

#: A fake engine whose texts show a splice, with one seed that kills it. `count_folder` is to be filled in.
MODELS = f"""
[[models]]
id = "{FAKE_MODEL}"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 16
[models.fake]
step_seconds = 0.025
chained = true
crash_at_token = 6
crash_seed = {POISON_SEED}
crash_how = "exit"
count_folder = "{{count_folder}}"
"""
REAL_MODELS = """
[[models]]
id = "{id}"
path = "{path}"
max_model_len = 1024
max_num_seqs = 8
"""


class Workload:
    """`num_clients` clients, each with one job after another until `stop`. Everything follows from the seed, as far as
    a system under faults allows."""

    def __init__(self, clients: Clients, *, num_clients: int, seed: int, has_real_model: bool, max_tokens: int) -> None:
        self._clients = clients
        self._num_clients = num_clients
        self._random = random.Random(seed)
        self._has_real_model = has_real_model
        self._max_tokens = max_tokens
        self._is_stopping = False
        self.num_ended = 0

    def stop(self) -> None:
        """No new jobs; those on their way are seen to their ends."""
        self._is_stopping = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_clients):
                group.create_task(self._be_a_client(random.Random(self._random.getrandbits(64))))

    async def _be_a_client(self, chooser: random.Random) -> None:
        while not self._is_stopping:
            history = self._clients.plan(self._body(chooser))
            if not await self._clients.submit(history):
                continue
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(history, chooser))
                if chooser.random() < 0.03:
                    group.create_task(self._cancel_later(history, 2 * chooser.random()))
                if chooser.random() < 0.05:
                    group.create_task(self._clients.submit(history))  # the same key: the same job
            self.num_ended += 1

    def _body(self, chooser: random.Random) -> dict[str, Any]:
        number = chooser.getrandbits(31)
        if self._has_real_model and chooser.random() < REAL_CHANCE:
            params = {"max_tokens": chooser.choice((16, 32, 64)), "temperature": 0, "ignore_eos": True, "seed": 1}
            return {"model": REAL_MODEL, "prompt": chooser.choice(REAL_PROMPTS), "params": params}
        if chooser.random() < POISON_CHANCE:
            return {
                "model": FAKE_MODEL,
                "prompt": f"poison {number}",
                "params": {"max_tokens": 40, "seed": POISON_SEED},
            }
        low, high = (round(share * self._max_tokens) for share in chooser.choice(SHARES))
        params = {"max_tokens": chooser.randint(low, high), "seed": number + 1000}
        body: dict[str, Any] = {"model": FAKE_MODEL, "prompt": f"job {number}", "params": params}
        if chooser.random() < 0.02:
            body["run_timeout"] = 0.2 + chooser.random()
        return body

    async def _watch(self, history: History, chooser: random.Random) -> None:
        """Break off and come back at random; once the job is over, see it again from anywhere."""
        breaks = [chooser.randint(1, 8) for _ in range(chooser.randint(MIN_RECONNECTS, MIN_RECONNECTS + 2))]
        hows = [chooser.choice(HOWS) for _ in range(len(breaks) + 1)]
        await self._clients.follow(history, breaks=breaks, hows=hows)
        while len(history.connections) <= MIN_RECONNECTS:
            how = chooser.choice(HOWS)
            await self._clients.replay(history, how, chooser.randint(0, history.last_number()))
        await self._clients.look(history)

    async def _cancel_later(self, history: History, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._clients.cancel(history)


def describe(schedule: Sequence[Fault]) -> str:
    return "; ".join(map(str, schedule))
