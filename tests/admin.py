"""What the tests of all admin pages have in common."""

from collections.abc import Callable
from typing import Any

from django.urls import reverse

from tests.queries import statements


def read_page(client: Any, model: type, page: str, *args: Any, **query: Any) -> tuple[int, int]:
    """Return the status of an admin page and how many statements it took."""
    url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)
    with statements() as made:
        status = client.get(url, query).status_code
    return status, len(made)


def list_pages(client: Any, model: type, make_rows: Callable[[int], None]) -> list[tuple[int, int]]:
    """Read the list of ``model`` with 5 rows more, then with 20 more again."""
    pages = []
    for count in (5, 20):
        make_rows(count)
        pages.append(read_page(client, model, "changelist"))
    return pages


def act(client: Any, row: Any, action: str, *, confirmed: str = "yes", **fields: Any) -> Any:
    """Send the confirmed form of a staff action on ``row``; without ``confirmed``, ask first."""
    meta = row._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_act", args=[row.pk, action])
    given = {"reason": "Asked for"} | fields | ({"confirmed": confirmed} if confirmed else {})
    return client.post(url, given)
