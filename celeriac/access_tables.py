"""The tables of `celeriac keys` and `celeriac tenants`."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from celeriac.access_options import in_words


def _table(*names: str) -> Table:
    """The first column is never cut; the last one wraps."""
    table = Table(box=None, pad_edge=False)
    table.add_column(names[0], no_wrap=True, overflow="ignore")
    for name in names[1:]:
        table.add_column(name, overflow="fold" if name == names[-1] else "ellipsis")
    return table


def keys_table(keys: Iterable[Mapping[str, Any]]) -> Table:
    """API keys as /v1/admin/keys describes them."""
    table = _table("id", "tenant", "name", "scopes", "created", "state", "limits")
    for key in keys:
        state = key["status"]
        if state == "disabled":
            state = f"disabled {key['disabled_at'][:10]}"
        elif key["expires_at"] is not None:
            state = f"{'expired' if state == 'expired' else 'until'} {key['expires_at'][:10]}"
        scopes, limits = " ".join(key["scopes"]), in_words(key["limits"])
        table.add_row(key["id"], key["tenant"], escape(key["name"]), scopes, key["created_at"][:10], state, limits)
    return table


def tenants_table(tenants: Iterable[Mapping[str, Any]]) -> Table:
    """Tenants as /v1/admin/tenants describes them."""
    table = _table("tenant", "state", "weight", "max priority", "created", "limits")
    for tenant in tenants:
        state, weight = "enabled" if tenant["enabled"] else "disabled", f"{tenant['weight']:g}"
        limits, created = in_words(tenant["limits"], tenant.get("left")), tenant["created_at"][:10]
        table.add_row(escape(tenant["name"]), state, weight, str(tenant["max_priority"]), created, limits)
    return table


def audit_table(entries: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("when", "actor", "action", "tenant", "key", "changes")
    for entry in entries:
        what = (entry["action"], escape(entry["tenant"]), entry["key_id"] or "", escape(json.dumps(entry["changes"])))
        table.add_row(entry["changed_at"], escape(entry["actor"]), *what)
    return table
