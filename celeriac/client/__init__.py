"""The client library, for threads and for asyncio. It needs httpx; progress bars need rich.

```python
from celeriac.client import Client

with Client("http://127.0.0.1:8000") as client:
    job = client.submit("Once upon a time", max_tokens=50)  # committed: it runs, whatever becomes of this process
    for event in client.stream(job.id):  # survives dropped connections, repeats nothing
        print(event.text, end="", flush=True)
```
"""

from celeriac.client.asynchronous import AsyncClient
from celeriac.client.errors import ApiError, ApiUnreachable, ClientError, JobNotCompleted, UnexpectedAnswer
from celeriac.client.sync import Client
from celeriac.client.views import BatchSnapshot, JobPage, JobSnapshot, QueueUpdate, StreamEvent

__all__ = [
    "ApiError",
    "ApiUnreachable",
    "AsyncClient",
    "BatchSnapshot",
    "Client",
    "ClientError",
    "JobNotCompleted",
    "JobPage",
    "JobSnapshot",
    "QueueUpdate",
    "StreamEvent",
    "UnexpectedAnswer",
]
