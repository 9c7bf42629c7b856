"""The tables that the commands print, whose ids and paths are never cut in a pipe."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from celeriac.client import JobSnapshot
from celeriac.consoles import VisibleConsole

if TYPE_CHECKING:
    from celeriac.store.store import Manifest
    from domain.catalog import Catalog
    from domain.model_sources import KnownModel

PIPE_WIDTH = 10_000  # characters per line if the output is not a terminal

NARROW = 72  # characters: below, a table of jobs would lose its words, so each row is a block of lines

STYLE_BY_STATUS = {
    "queued": "yellow",
    "in_progress": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "dim",
    "expired": "dim",
}


def show(table: Table) -> None:
    """Print a table. In a pipe no cell is cut, since the next program needs whole values."""
    console = VisibleConsole(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(fitted(table, console.width))


def fitted(table: Table, width: int) -> RenderableType:
    """As it can be read on a terminal of this width. What the first column names is never cut."""
    first, *others = table.columns
    if width >= NARROW:
        first.min_width = max(Text.from_markup(str(cell)).cell_len for cell in (first.header, *first.cells))
        return table
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return Group(*(_block(str(name), others, cells) for name, *cells in rows))


def _block(name: str, columns: Sequence[Column], cells: Iterable[RenderableType]) -> RenderableType:
    block = Table(Column(style="dim", no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
    for column, cell in zip(columns, cells, strict=True):
        if cell:
            block.add_row(column.header, cell)
    return Group(Text.from_markup(name), block)


def table_of(whole: str, *others: str, folded: str | None = None) -> Table:
    """A table whose column `whole` is never cut, however narrow the terminal, and whose column `folded` wraps."""
    table = Table(Column(whole, no_wrap=True, overflow="ignore"), box=None, pad_edge=False)
    for name in others:
        table.add_column(name, overflow="fold" if name == folded else "ellipsis")
    return table


def jobs_table(jobs: Iterable[JobSnapshot]) -> Table:
    table = table_of("job", "status", "model", "tokens", "age", "took")
    for job in jobs:
        began, ended = job.raw.get("started_at"), job.raw.get("finished_at")
        table.add_row(
            job.id,
            f"[{STYLE_BY_STATUS.get(job.status, '')}]{job.status}[/]",
            escape(job.model),
            str(job.usage.get("completion_tokens", "")),
            age_of(job.raw.get("created_at"), None),
            age_of(began, ended) if began and ended else "",
        )
    return table


def dead_letters_table(jobs: Iterable[JobSnapshot]) -> Table:
    table = table_of("job", "model", "attempts", "failed", "code", "reason", folded="reason")
    for job in jobs:
        error = job.error or {}
        table.add_row(
            job.id,
            escape(job.model),
            str(len(job.raw.get("attempts") or ())),
            f"{age_of(job.raw.get('finished_at'), None)} ago",
            error.get("code", ""),
            escape(error.get("message", "")),
        )
    return table


def attempts_table(attempts: Iterable[Mapping[str, Any]]) -> Table:
    table = table_of("attempt on", "number", "outcome", "code", "tokens", "began", "took")
    for one in attempts:
        took = age_of(one["started_at"], one["ended_at"]) if one["ended_at"] else ""
        table.add_row(
            escape(one["worker"] or one["worker_id"]),
            str(one["attempt"]),
            one["outcome"] or "running",
            one["error_code"] or "",
            str(one["num_tokens"]),
            one["started_at"],
            took,
        )
    return table


def queues_table(queues: Iterable[Mapping[str, Any]]) -> Table:
    """The queues of all models, as /v1/queue describes them."""
    table = Table(Column("model", no_wrap=True, overflow="ignore"), box=None, pad_edge=False)
    for name in ("queued", "running", "slots", "workers", "tokens/s", "oldest", "ETA", "waiting for"):
        table.add_column(name, overflow="fold")
    for queue in queues:
        eta, oldest = queue["eta_seconds"], queue["oldest_queued_seconds"]
        reasons = ", ".join(f"{reason} {number}" for reason, number in queue["waiting_for"].items() if number)
        table.add_row(
            escape(queue["model"]),
            str(queue["queued"]),
            str(queue["running"]),
            str(queue["slots"]),
            with_percent(str(queue["workers"]), queue),
            f"{queue['tokens_per_second']:.0f}",
            duration(oldest) if queue["queued"] else "",
            "" if eta is None else duration(eta),
            reasons,
        )
    return table


def workers_table(models: Iterable[dict[str, Any]]) -> Table:
    """The live workers of these models, as the admin API describes them."""
    table = table_of("worker", "model", "state", "running", "tokens/s", folded="state")
    rows = [(worker["hostname"], model["id"], worker) for model in models for worker in model["workers"]]
    for hostname, model_id, worker in sorted(rows, key=lambda row: row[:2]):
        running = f"{worker['num_running']} of {worker['max_num_seqs']}"
        state = "; ".join([with_percent(worker["state"], worker), *worker.get("troubles", {}).values()])
        table.add_row(hostname, model_id, escape(state), running, f"{worker['tokens_per_second']:g}")
    return table


def with_percent(state: str, facts: Mapping[str, Any]) -> str:
    """How far a load has come is added if that is known: `loading 43 %`."""
    percent = facts.get("load_percent")
    return state if percent is None else f"{state} {percent} %"


def models_table(catalog: "Catalog") -> Table:
    """The available models."""
    from local.processes import short_path

    table = table_of("model", "context", "at once", "back end", "path", folded="path")
    for entry in catalog:
        name = f"{entry.id} [dim](default)[/]" if entry.id == catalog.default_id else entry.id
        length = f"{entry.max_model_len} tokens" if entry.max_model_len is not None else "its own"
        at_once = f"{entry.max_num_seqs} sequences" if entry.max_num_seqs is not None else "by device"
        table.add_row(name, length, at_once, entry.backend, short_path(entry.path))
    return table


def stored_models_table(manifests: Iterable["Manifest"]) -> Table:
    table = table_of("model", "size", "pulled", "licence", "source", folded="source")
    for manifest in manifests:
        size = f"{manifest.num_bytes / 1e6:,.0f} MB"
        table.add_row(manifest.name, size, f"{manifest.pulled_at:%Y-%m-%d}", manifest.licence, manifest.source)
    return table


def known_models_table(known_by_name: Mapping[str, "KnownModel"]) -> Table:
    table = table_of("name", "download", "licence", "what it is", folded="what it is")
    for name, known in known_by_name.items():
        licence = f"{known.licence} (--accept-licence)" if known.must_accept else known.licence
        table.add_row(name, f"{known.num_bytes / 1e6:,.0f} MB", licence, known.title)
    return table


def pulls_table(pulls: Iterable[Mapping[str, Any]]) -> Table:
    """Pulls as the admin API describes them."""
    table = table_of("model", "status", "source", "progress", folded="progress")
    for pull in pulls:
        done = f"{pull['bytes'] / 1e6:,.0f} MB" if pull["bytes"] else ""
        total = f" of {pull['total_bytes'] / 1e6:,.0f} MB" if pull["total_bytes"] else ""
        progress = f"{pull['step']} {done}{total}".strip() if pull["status"] == "running" else pull["error"] or ""
        table.add_row(pull["id"], pull["status"], pull["source"], escape(progress))
    return table


def age_of(since: str | None, until: str | None) -> str:
    """The time from `since` to `until`, or to now if that is None. Empty if it never began."""
    if since is None:
        return ""
    end = datetime.fromisoformat(until) if until else datetime.now(UTC)
    return duration((end - datetime.fromisoformat(since)).total_seconds())


def duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
