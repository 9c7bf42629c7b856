"""The recipe for LangGraph of docs/recipes.md: a run whose nodes are repeated pays for no text twice."""

from importlib.metadata import version
from typing import Any

from celeriac.client import Client
from tests.conformance.programs import report
from tests.recipes import program

names: dict[str, Any] = {"__name__": "recipe"}
exec(program("LangGraph: long runs", "python"), names)
stories = names["stories"]


def num_jobs() -> int:
    with Client() as client:
        return len(client.jobs(limit=100).jobs)


def a_whole_run() -> None:
    story = stories.invoke({"topic": "Once"}, {"configurable": {"thread_id": "whole"}})
    assert story["draft"]
    assert story["ending"]


def a_run_that_is_repeated() -> None:
    """As after a kill without a checkpoint: the nodes run again, and find their jobs."""
    config = {"configurable": {"thread_id": "repeated"}}
    story = stories.invoke({"topic": "Once"}, config)
    before = num_jobs()
    assert names["draft"](story, config) == {"draft": story["draft"]}
    assert names["end"](story, config) == {"ending": story["ending"]}
    assert num_jobs() == before


report.run([a_whole_run, a_run_that_is_repeated], version=version("langgraph"))
