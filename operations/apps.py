from django.apps import AppConfig


class OperationsConfig(AppConfig):
    """What operators watch and rehearse: health, metrics, logs, heartbeats of the loops."""

    name = "operations"
