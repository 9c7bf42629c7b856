"""What an API that others reach may not start with. Imports little: `celeriac up` asks before it starts anything."""

from domain.addresses import is_loopback
from settings import Settings


def refuse_development_settings(settings: Settings) -> None:
    """What is right on a developer's machine, and would open an API that others reach, or the network behind it: no
    keys, as anyone would own every job; pages of any origin without keys; webhooks to any address. Raises
    ValueError."""
    if settings.webhook_private_targets and not is_loopback(settings.host):
        raise ValueError(
            f"CELERIAC_HOST is {settings.host!r} and CELERIAC_WEBHOOK_PRIVATE_TARGETS is true: whoever has a key could "
            "send requests to every service in your network; name the networks of your receivers in "
            "CELERIAC_WEBHOOK_PRIVATE_NETWORKS instead"
        )
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
