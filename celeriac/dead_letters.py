"""`celeriac dead-letters`: the jobs that failed for good. Each command imports what it needs when it runs."""

from typing import TYPE_CHECKING

import click

from celeriac.options import connection_options, json_option, open_client, print_json

if TYPE_CHECKING:
    from celeriac.client import JobSnapshot


@click.group("dead-letters")
def dead_letters() -> None:
    """List, show, retry and delete jobs that failed for good.

    \b
    celeriac dead-letters list
    celeriac dead-letters show job_01...
    celeriac dead-letters retry job_01... job_02...
    """


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--after", metavar="JOB_ID", help="Begin after this job, the last one of the previous page.")
@connection_options
@json_option
def list_dead_letters(limit: int, after: str | None, url: str | None, key: str | None, as_json: bool) -> None:
    """List failed jobs, newest first, with their reasons."""
    from celeriac.tables import dead_letters_table, show

    with open_client(url, key) as client:
        page = client.dead_letters(limit=limit, after=after)
    if as_json:
        print_json([job.raw for job in page])
    elif not page.jobs:
        click.echo("No job has failed.", err=True)
    else:
        show(dead_letters_table(page))
        if page.next_page is not None:
            click.echo(f"There are more: celeriac dead-letters list --after {page.next_page}", err=True)


@dead_letters.command("show")
@click.argument("job_id")
@connection_options
@json_option
def show_dead_letter(job_id: str, url: str | None, key: str | None, as_json: bool) -> None:
    """Show why JOB_ID failed, and each of its attempts. Its prompt and output are shown only with --json."""
    from celeriac.consoles import visible
    from celeriac.tables import attempts_table, show

    with open_client(url, key) as client:
        job = client.get(job_id, include=("input", "output", "attempts"))
    if as_json:
        print_json(job.raw)
        return
    click.echo(visible("\n".join(_described(job))))
    show(attempts_table(job.raw["attempts"]))


@dead_letters.command("retry")
@click.argument("job_ids", nargs=-1, required=True)
@click.option("--allow-poison", is_flag=True, help="Also run a job that has crashed an engine; it then runs alone.")
@connection_options
@json_option
def retry_dead_letters(
    job_ids: tuple[str, ...], allow_poison: bool, url: str | None, key: str | None, as_json: bool
) -> None:
    """Submit the requests of failed jobs again, each as a new job. Repeating it returns the same new jobs."""
    with open_client(url, key) as client:
        for job_id in job_ids:
            new_job = client.replay(job_id, allow_poison=allow_poison)
            print_json(new_job.raw) if as_json else click.echo(f"{job_id}: runs again as {new_job.id}")


@dead_letters.command("delete")
@click.argument("job_ids", nargs=-1, required=True)
@connection_options
@json_option
def delete_dead_letters(job_ids: tuple[str, ...], url: str | None, key: str | None, as_json: bool) -> None:
    """Erase failed jobs, with their requests and outputs. Jobs that have not failed are refused."""
    with open_client(url, key) as client:
        for job_id in job_ids:
            job = client.get(job_id)
            if job.status != "failed":
                raise click.ClickException(f"{job_id} is {job.status}, not failed; only failed jobs are deleted here")
            client.delete(job_id)
            print_json({"id": job_id, "deleted": True}) if as_json else click.echo(f"{job_id}: deleted")


def _described(job: "JobSnapshot") -> list[str]:
    error = job.error or {}
    return [
        f"{job.id}: {job.status}, model {job.model}",
        f"  {error.get('message', 'no error is known')} [{error.get('code', '?')}]",
        f"  accepted {job.raw['created_at']}, ended {job.raw['finished_at']}",
    ]
