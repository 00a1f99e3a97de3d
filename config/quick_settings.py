"""Settings for code that runs with every hot request.

Each look into Django's own object takes half a microsecond, a hot request has half a dozen of
them, and they don't change while a process runs.
"""

from typing import Any

from django.conf import settings
from django.core.signals import setting_changed


class QuickSettings:
    """Django's settings, each looked up once."""

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(settings, name)
        return value


quick_settings = QuickSettings()


def look_up_again(**kwargs: Any) -> None:
    quick_settings.__dict__.clear()


# Sent by tests that change one.
setting_changed.connect(look_up_again)
