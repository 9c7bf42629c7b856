"""Whom the API may be open to without keys. Imports little, as `celeriac up` asks before it starts anything."""

from domain.addresses import is_loopback
from settings import Settings


def refuse_public_access_without_keys(settings: Settings) -> None:
    """Without keys anyone who reaches the API owns every job, so only this machine may reach it, and no web page that
    happens to be open in its browser. Raises ValueError."""
    if settings.auth != "none":
        return
    if not is_loopback(settings.host):
        raise ValueError(
            f"CELERIAC_HOST is {settings.host!r} and CELERIAC_AUTH is 'none': anyone on the network could use the API; "
            "set CELERIAC_AUTH=api_key, or leave CELERIAC_HOST at 127.0.0.1"
        )
    if "*" in settings.cors_origin_list:
        raise ValueError(
            "CELERIAC_CORS_ORIGINS is '*' and CELERIAC_AUTH is 'none': any web page could use the API; "
            "name the origins, or set CELERIAC_AUTH=api_key"
        )
