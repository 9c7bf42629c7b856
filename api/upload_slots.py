"""How many uploads one process takes at once, and how many of them may be one tenant's."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from uuid import UUID

from domain.errors import ServerOverloaded

TENANT_SHARE = 0.75  # of the places; where there is more than one, a tenant never has them all


class UploadSlots:
    """The places, and who holds them."""

    def __init__(self, max_open: int, *, is_shared: bool) -> None:
        """`is_shared`: several tenants may come."""
        self._max_open = max_open
        self._max_per_tenant = max(1, int(max_open * TENANT_SHARE)) if is_shared else max_open
        self._num_by_tenant: Counter[UUID] = Counter()

    @contextlib.contextmanager
    def hold(self, tenant_id: UUID) -> Iterator[None]:
        """Raises ServerOverloaded where no place is free."""
        if self._num_by_tenant.total() >= self._max_open:
            raise ServerOverloaded("as many uploads as this server takes at once are under way; retry in a moment")
        if self._num_by_tenant[tenant_id] >= self._max_per_tenant:
            raise ServerOverloaded(
                f"{self._max_per_tenant} uploads of yours are under way, as many as one tenant may have; retry when "
                "one is done"
            )
        self._num_by_tenant[tenant_id] += 1
        try:
            yield
        finally:
            self._num_by_tenant[tenant_id] -= 1
            self._num_by_tenant += Counter()  # forgets those who hold none
