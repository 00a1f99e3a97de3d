"""How the admin looks, and its menu: the settings of unfold."""

from functools import partial
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse_lazy


def admin_section(title: str, *models: tuple[str, str, str]) -> dict[str, Any]:
    """Return a group of the admin's menu: ``(model, title, icon)``, shown to who may view it."""
    return {
        "title": title,
        "items": [
            {
                "title": name,
                "icon": icon,
                "link": reverse_lazy(f"admin:{model.replace('.', '_')}_changelist"),
                "permission": partial(may_view, model),
            }
            for model, name, icon in models
        ],
    }


def may_view(model: str, request: HttpRequest) -> bool:
    app, _, name = model.partition(".")
    return request.user.has_perm(f"{app}.view_{name}")


UNFOLD = {
    "SITE_TITLE": "Sneaker drops",
    "SITE_HEADER": "Sneaker drops",
    "SITE_SUBHEADER": "Control room",
    "SITE_SYMBOL": "bolt",
    "SITE_FAVICONS": [
        {
            "rel": "icon",
            "type": "image/svg+xml",
            "href": lambda request: static("control/icon.svg"),
        }
    ],
    "STYLES": [lambda request: static("control/control.css")],
    "BORDER_RADIUS": "8px",
    # The paper, ink and accent of storefront/site.css, with the steps between.
    "COLORS": {
        "base": {
            "50": "#f9f8f5",
            "100": "#f2f0eb",
            "200": "#e2e0da",
            "300": "#cdcac2",
            "400": "#a5a4ad",
            "500": "#6b6a72",
            "600": "#4b4a51",
            "700": "#3a3a40",
            "800": "#2a2a2f",
            "900": "#17171a",
            "950": "#0e0e10",
        },
        "primary": {
            "50": "#fff6ed",
            "100": "#ffead5",
            "200": "#fed7aa",
            "300": "#fdba74",
            "400": "#fb923c",
            "500": "#fb923c",
            "600": "#c2410c",
            "700": "#9a3412",
            "800": "#7c2d12",
            "900": "#5f2410",
            "950": "#431407",
        },
    },
    "SIDEBAR": {
        "navigation": [
            {
                "items": [
                    {
                        "title": "Control room",
                        "icon": "monitor_heart",
                        "link": reverse_lazy("admin:index"),
                    },
                    {
                        "title": "Stock audit",
                        "icon": "fact_check",
                        "link": reverse_lazy("audit"),
                        "permission": partial(may_view, "drops.drop"),
                    },
                ]
            },
            admin_section(
                "Sale",
                ("drops.drop", "Drops", "steps"),
                ("drops.stockadjustment", "Stock adjustments", "inventory_2"),
                ("reservations.reservation", "Reservations", "timer"),
                ("purchases.purchase", "Purchases", "receipt_long"),
            ),
            admin_section(
                "Logs",
                ("realtime.event", "Events", "stream"),
                ("admin.logentry", "Staff log", "history"),
            ),
            admin_section(
                "People",
                ("users.user", "Users", "group"),
                ("auth.group", "Roles", "badge"),
            ),
        ]
    },
}
