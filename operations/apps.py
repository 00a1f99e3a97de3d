from django.apps import AppConfig
from django.conf import settings


class OperationsConfig(AppConfig):
    """What operators watch and rehearse: health, metrics, logs, heartbeats of the loops."""

    name = "operations"

    def ready(self) -> None:
        if settings.SENTRY_DSN:
            from operations.telemetry import start_sentry

            start_sentry()
