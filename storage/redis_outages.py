"""What the asyncio client raises where Redis is away, slow, or lost in mid-sentence."""

from redis.exceptions import RedisError

#: RuntimeError is uvloop's: "the handler is closed", where a connection that Redis cut is written to before its end was
#: read. AttributeError is the client's own, where another task closes the connection while this one writes: it has no
#: writer any more. TimeoutError (an OSError) is that of our own deadlines too.
REDIS_OUTAGES = (RedisError, OSError, RuntimeError, AttributeError)
