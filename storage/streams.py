"""Live chunks: published by the worker after their commit, read by the API.

Redis keys
| name                     | type    | lifetime | writer | reader |
|--------------------------|---------|----------|--------|--------|
| celeriac:stream:{job_id} | channel | -        | worker | API    |

A message is JSON: {"chunk": TokenChunk} or {"status": JobStatus} for a transition.
Pub/sub may lose, repeat or delay anything: the reader subscribes first, replays SQL, goes live, drops repeats and
fills gaps.
"""
