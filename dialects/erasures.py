"""Erasures of users as administrators ask for them and see them, in /v1/admin and as the JSON of `celeriac`."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from dialects.administration import AdminBody
from dialects.native import NO_NUL
from dialects.openai_views import PageView, Timestamp, View, optional_timestamp, timestamp
from domain.jobs import external_id
from storage.erasure import Person
from storage.erasures import Erasure

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
Value = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]


class ErasureBody(AdminBody):
    """POST /v1/admin/tenants/{tenant}/erasures: whose it is, by one of the two."""

    metadata: dict[Name, Value] | None = Field(
        default=None,
        description="The entry that the user's jobs, batches and conversations have in common.",
        min_length=1,
        max_length=1,
    )
    key_id: Name | None = Field(
        default=None,
        description="The id of the API key that the user's jobs and batches were sent with. It may be deleted by now, "
        "so it is not checked: the counts show whether it was the right one.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.metadata is None) == (self.key_id is None):
            raise ValueError("say whose: give either metadata or key_id")
        return self

    @property
    def person(self) -> Person:
        if self.metadata is None:
            return Person(key_id=self.key_id)
        [entry] = self.metadata.items()
        return Person(metadata=entry)


class ErasureView(View):
    id: str
    object: Literal["erasure"]
    status: Literal["running", "completed"]
    key_id: str | None
    metadata: Annotated[str | None, Field(description="The name of the entry; its value is not shown.")]
    step: Annotated[str, Field(description="What it is at: batches, jobs, conversations, archive, done.")]
    jobs: Annotated[int, Field(description="How many were erased so far.")]
    batches: int
    conversations: int
    archived_jobs: int
    unfinished_batches: Annotated[int, Field(description="They were asked to stop, and are erased when they have.")]
    files_to_delete: Annotated[
        list[str], Field(description="Files of others, which also contain lines of the user; delete them by hand.")
    ]
    error: Annotated[str | None, Field(description="Why it does not go on at the moment. It is tried again.")]
    created_at: Timestamp
    finished_at: Timestamp | None


class ErasureListView(PageView):
    data: list[ErasureView]


def erasure_view(erasure: Erasure) -> ErasureView:
    return {
        "id": external_id(erasure.id, "erasure"),
        "object": "erasure",
        "status": "completed" if erasure.is_done else "running",
        "key_id": erasure.key_id,
        "metadata": erasure.metadata_name,
        "step": erasure.step,
        "jobs": erasure.num_jobs,
        "batches": erasure.num_batches,
        "conversations": erasure.num_conversations,
        "archived_jobs": erasure.num_archived_jobs,
        "unfinished_batches": erasure.num_unfinished_batches,
        "files_to_delete": [external_id(id_, "file") for id_ in erasure.file_ids],
        "error": erasure.error,
        "created_at": timestamp(erasure.created_at),
        "finished_at": optional_timestamp(erasure.finished_at),
    }
