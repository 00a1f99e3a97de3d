"""Give the test run servers of its own, unless DATABASE_URL and REDIS_URL name others."""

import pytest
from rest_framework.test import APIClient

pytest_plugins = ["tests.servers", "tests.through_proxy"]


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Say what the plain command leaves out."""
    if config.option.markexpr == "not slow and not browser":
        terminalreporter.write_line(
            "Left out: tests that take long (pytest -m slow), and those of the pages in a "
            "browser (pytest -m browser, with chromium installed)."
        )


@pytest.fixture(scope="session")
def servers():
    """The embedded PostgreSQL and Redis of this run, or None where the URLs name others."""
    from django.conf import settings

    if settings.EMBEDDED is None:
        yield None
    else:
        with settings.EMBEDDED:
            yield settings.EMBEDDED


@pytest.fixture(scope="session")
def django_db_modify_db_settings(servers):
    """Start the servers before pytest-django creates the test database."""


@pytest.fixture(scope="session")
def handler(request):
    """One handler for all API clients: each of its own would list the static files anew."""
    if request.config.getoption("through_proxy"):
        # Here, because pytest rewrites the assertions of a plugin when it imports it.
        from tests.through_proxy import SendOverHttp

        return SendOverHttp(request.getfixturevalue("proxied").url)
    return APIClient().handler


@pytest.fixture
def client_of(handler):
    """Return a function that makes an API client speak for a user, or for nobody."""

    def make(user=None, **headers):
        client = APIClient()
        client.handler = handler
        if user is not None:
            headers["HTTP_X_USER_ID"] = str(getattr(user, "pk", user))
        client.credentials(**headers)
        return client

    return make
