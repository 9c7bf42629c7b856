"""Everything that goes wrong, and when: a schedule drawn from a seed, and how each fault is done to a plant."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from local.servers import EmbeddedServer
from tests.chaos.plant import Part, Plant, send_to
from tests.chaos.proxy import Link
from tests.pooler import Pooler

#: How often each kind is drawn.
WEIGHTS = {
    "worker kill": 22,
    "worker pause": 14,
    "worker and engine pause": 6,
    "worker drain": 4,
    "engine segfault": 4,
    "engine kill": 4,
    "engine hang": 3,
    "api kill": 8,
    "api pause": 2,
    "api drain": 2,
    "maintenance kill": 2,
    "maintenance pause": 2,
    "redis flush": 5,
    "redis kill": 3,
    "redis kill, emptied": 3,
    "redis pause": 4,
    "postgres restart": 4,
    "postgres pause": 3,
    "cut after commit": 8,
    "cut after push": 3,
    "reset": 3,
    "half-open postgres": 3,
    "half-open redis": 2,
    "latency": 2,
}

#: Where a pooler stands before PostgreSQL.
POOLER_WEIGHTS = WEIGHTS | {"pooler kill": 6}


@dataclass(frozen=True, slots=True)
class Fault:
    """`choice` and `size`, both in [0, 1), settle whom it befalls and for how long."""

    at: float
    kind: str
    choice: float
    size: float

    def __str__(self) -> str:
        return f"{self.at:.1f} {self.kind} {self.choice:.2f}/{self.size:.2f}"


def make_schedule(
    seed: int, *, seconds: float, per_minute: float, weights: Mapping[str, float] = WEIGHTS
) -> list[Fault]:
    """The same for the same arguments. Every kind comes once before any is drawn by weight."""
    chooser = random.Random(seed)
    kinds = [kind for kind, weight in weights.items() if weight > 0]
    chooser.shuffle(kinds)
    faults, at = [], 0.0
    while (at := at + chooser.expovariate(per_minute / 60)) < seconds:
        kind = kinds.pop() if kinds else chooser.choices(list(weights), list(weights.values()))[0]
        faults.append(Fault(round(at, 1), kind, chooser.randrange(100) / 100, chooser.randrange(100) / 100))
    return faults


@dataclass(slots=True)
class Struck:
    """A fault that was done; `target` is empty for one that found nothing to befall."""

    kind: str
    target: str
    began_at: float
    ended_at: float = 0.0


@dataclass(slots=True)
class Striker:
    """Does faults to a plant whose parts reach the servers through `links`, by name."""

    plant: Plant
    links: Mapping[str, Link]
    lease_seconds: float
    has_isolated: Callable[[str], bool]  # whether this worker runs a suspect alone
    pooler: Pooler | None = None
    struck: list[Struck] = field(default_factory=list)
    _busy: set[str] = field(default_factory=set)

    async def run(self, schedule: Sequence[Fault]) -> None:
        """Returns when every fault of the schedule has been done and mended."""
        began_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in schedule:
                await asyncio.sleep(max(0.0, began_at + fault.at - time.monotonic()))
                group.create_task(self.strike(fault))

    async def strike(self, fault: Fault) -> None:
        record = Struck(fault.kind, "", time.time())
        self.struck.append(record)
        subject, _, what = fault.kind.partition(" ")
        if subject in ("worker", "engine", "api", "maintenance"):
            await self._strike_part(fault, record, subject)
        elif subject in ("redis", "postgres"):
            await self._strike_server(fault, record, subject, what)
        elif subject == "pooler":
            await self._strike_pooler(fault, record)
        else:
            await self._strike_link(fault, record)
        record.ended_at = time.time()

    # Processes

    async def _strike_part(self, fault: Fault, record: Struck, subject: str) -> None:
        parts = {"api": self.plant.apis, "maintenance": self.plant.maintenance}.get(subject, self.plant.workers)
        able = [part for part in parts if part.is_running and not part.is_paused and part.name not in self._busy]
        if not able:
            return
        part = able[int(fault.choice * len(able))]
        record.target = part.name
        what = fault.kind.removeprefix(f"{subject} ")
        if subject == "engine":
            self._strike_engine(part, what, record)
        elif what == "kill":
            part.kill()
        elif what == "drain":
            part.send(signal.SIGTERM)
        else:
            await self._pause(part, self._pause_seconds(subject, fault), with_engine="engine" in what)

    def _pause_seconds(self, subject: str, fault: Fault) -> float:
        if subject == "api":
            return 0.5 + 2 * fault.size
        return self.lease_seconds * (0.5 + 2 * fault.size)  # most are longer than the lease

    async def _pause(self, part: Part, seconds: float, *, with_engine: bool) -> None:
        self._busy.add(part.name)
        incarnation, engine_pid = part.newest, part.engine_pid() if with_engine else None
        part.pause()
        send_to([engine_pid] if engine_pid else [], signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if part.newest is incarnation:
            part.resume()
        send_to([engine_pid] if engine_pid else [], signal.SIGCONT)
        self._busy.discard(part.name)

    def _strike_engine(self, part: Part, what: str, record: Struck) -> None:
        pid = part.engine_pid()
        if pid is None or (what == "segfault" and self.has_isolated(part.name)):
            record.target = ""  # a suspect that crashes alone is guilty; we must not make one so
            return
        signals = {"segfault": signal.SIGSEGV, "kill": signal.SIGKILL, "hang": signal.SIGSTOP}
        send_to([pid], signals[what])  # one that hangs is found and killed by its supervisor

    # Servers

    async def _strike_server(self, fault: Fault, record: Struck, subject: str, what: str) -> None:
        server: EmbeddedServer = self.plant.postgres if subject == "postgres" else self.plant.redis
        if subject in self._busy:
            return
        self._busy.add(subject)
        record.target = subject
        if what == "flush":
            await asyncio.to_thread(self.plant.redis_client().flushall)
        elif what == "pause":
            pids = self.plant.pids_of(server)
            send_to(pids, signal.SIGSTOP)
            await asyncio.sleep(1 + self.lease_seconds * 1.5 * fault.size)
            send_to(pids, signal.SIGCONT)
        elif subject == "postgres":
            await asyncio.to_thread(self.plant.restart_postgres)
        else:
            await asyncio.to_thread(self.plant.restart_redis, is_emptied="emptied" in what)
        self._busy.discard(subject)

    async def _strike_pooler(self, fault: Fault, record: Struck) -> None:
        if self.pooler is None or "pooler" in self._busy:
            return
        self._busy.add("pooler")
        record.target = "pooler"
        self.pooler.kill()
        await asyncio.sleep(self.lease_seconds * fault.size)
        await asyncio.to_thread(self.pooler.start)
        self._busy.discard("pooler")

    # Connections

    async def _strike_link(self, fault: Fault, record: Struck) -> None:
        server = "redis" if fault.kind in ("half-open redis", "cut after push") else "postgres"
        links = [link for link in self.links.values() if link.name.endswith(server) and link.name not in self._busy]
        if not links:
            return
        link = links[int(fault.choice * len(links))]
        record.target = link.name
        self._busy.add(link.name)
        doing: dict[str, Callable[[], Awaitable[None]]] = {
            "cut after commit": lambda: self._cut(link, b"COMMIT"),
            "cut after push": lambda: self._cut(link, b"LPUSH"),
            "reset": lambda: self._reset(link),
            "latency": lambda: self._delay(link, 0.2 * fault.size),
        }
        await doing.get(fault.kind, lambda: self._break_off(link, 1 + self.lease_seconds * fault.size))()
        self._busy.discard(link.name)

    async def _cut(self, link: Link, words: bytes) -> None:
        num_before = link.num_cuts
        link.cut_after(words)
        for _ in range(40):
            await asyncio.sleep(0.05)
            if link.num_cuts > num_before:
                return
        link.mend()

    async def _reset(self, link: Link) -> None:
        link.reset_all()

    async def _delay(self, link: Link, seconds: float) -> None:
        link.latency_seconds = seconds
        await asyncio.sleep(3)
        link.latency_seconds = 0.0

    async def _break_off(self, link: Link, seconds: float) -> None:
        link.break_off()
        await asyncio.sleep(seconds)
        link.mend()
