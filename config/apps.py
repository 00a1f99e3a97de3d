from django.apps import AppConfig


class ConfigConfig(AppConfig):
    name = "config"

    def ready(self) -> None:
        # Registers its checks.
        from config import checks  # noqa: F401
        from config.database import retry_soon

        retry_soon()
