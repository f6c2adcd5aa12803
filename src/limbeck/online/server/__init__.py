"""The server of `limbeck serve`: OpenAI's API, metrics and a dashboard around a service. Needs the extra `serve`."""

from limbeck.online.server.app import Served, create_app
from limbeck.online.server.limits import Keys, Limits

__all__ = ["Keys", "Limits", "Served", "create_app"]
