"""The protocol with one rule taken out, and the faults under which each lack shows: what gives the harness teeth."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.chaos.trees import Edit

SQL, ENDS_SQL = "storage/job_statements.py", "storage/job_ends.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    """`shows` are the kinds of violation of which at least one must be found."""

    edits: tuple[Edit, ...]
    weights: Mapping[str, float]
    shows: frozenset[str]


NO_FENCE = Mutant(
    edits=(
        Edit(
            SQL,
            " AND j.attempt = flush.attempt AND {OWNED}\n"
            "        AND j.committed_sequence_number IN (flush.before, flush.after)",
            "",
        ),
        Edit(
            SQL,
            "AS c(chunk, place)\n    ON CONFLICT DO NOTHING",
            "AS c(chunk, place)\n    ON CONFLICT (job_id, sequence_number) DO UPDATE SET chunk = excluded.chunk",
        ),
        Edit(
            ENDS_SQL,
            " AND j.attempt = ending.attempt AND {OWNED} AND j.committed_sequence_number = ending.last\n    ORDER",
            "\n    ORDER",
        ),
    ),
    weights={"worker pause": 1},  # a worker that comes back after its lease is what the fence is for
    shows=frozenset({"wrong chunk", "spliced text", "hole in the chunks", "result is not the chunks", "wrong result"}),
)

PUBLISHES_BEFORE_COMMIT = Mutant(
    edits=(
        Edit(
            "gpu_worker/commits.py",
            "    try:\n        held, ended = _transact(storage, flushes)",
            "    early = {flush.job.id: flush.commit.chunks for flush in flushes if flush.commit}\n"
            "    storage.notifier.publish((job_id, chunk) for job_id in early for chunk in early[job_id])\n"
            "    try:\n        held, ended = _transact(storage, flushes)",
        ),
    ),
    weights={"postgres pause": 1, "half-open postgres": 1, "worker kill": 3},  # killed while a commit hangs
    shows=frozenset({"wrong chunk", "uncommitted chunk seen", "cursor refused"}),
)

FILLS_NO_GAPS = Mutant(
    edits=(
        Edit(
            "storage/streams.py",
            "            elif news.sequence_number > self.last:\n                self.is_behind = True",
            "            elif news.sequence_number > self.last:\n"
            "                self.last = news.sequence_number\n                taken.append(news)",
        ),
    ),
    weights={"redis pause": 1, "redis kill": 1, "half-open redis": 2},
    shows=frozenset({"missing chunk", "stream ended early"}),
)

RESCUES_ON_A_STALE_SNAPSHOT = Mutant(
    edits=(
        Edit(
            "storage/jobs.py",
            "    return _returned(session, ends.RESCUE, parameters | ERRORS)",
            '    statement = "SELECT id FROM jobs WHERE lease_expires_at < now()"\n'
            '    lapsed = globals().setdefault("LAPSED", [])\n'
            '    lapsed.append(list(session.execute(__import__("sqlalchemy").text(statement)).scalars()))\n'
            '    stale = {"lapsed": lapsed[-3:][0]}  # as it was two looks ago\n'
            "    return _returned(session, ends.RESCUE, stale | parameters | ERRORS)",
        ),
        Edit(
            ENDS_SQL,
            "j.status = 'in_progress'\n        AND j.lease_expires_at < CAST(:as_of AS timestamptz)"
            " - make_interval(secs => :grace_seconds)\n",
            "j.id = ANY(CAST(:lapsed AS uuid[])) AND CAST(:grace_seconds AS float8) >= 0\n",
        ),
    ),
    weights={"worker pause": 3, "worker and engine pause": 1},
    shows=frozenset({"rescued under a valid lease", "terminal rewritten", "counter drift"}),
)

MUTANTS = {
    "no fence": NO_FENCE,
    "publishes before commit": PUBLISHES_BEFORE_COMMIT,
    "fills no gaps": FILLS_NO_GAPS,
    "rescues on a stale snapshot": RESCUES_ON_A_STALE_SNAPSHOT,
}
