"""One drop, as the OpenAPI document shows it."""

from typing import Any

DROP: dict[str, Any] = {
    "id": "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11",
    "name": "Aurora Runner 'Ember'",
    "description": "Five hundred pairs.",
    "image_url": "/static/storefront/aurora.svg",
    "price": "199.00",
    "currency": "USD",
    "total_stock": 500,
    "available_stock": 498,
    "availability": "available",
    "starts_at": "2026-11-22T18:00:00Z",
    "ends_at": None,
    "status": "live",
    "max_per_user": 1,
    "hold_cooldown_seconds": 300,
    "max_expired_holds": 2,
    "variants": [
        {
            "id": "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42",
            "label": "EU 42",
            "total_stock": 500,
            "available_stock": 498,
        }
    ],
    "seq": 4,
    "created_at": "2026-11-20T09:00:00Z",
    "activity_feed": {
        "latest_purchasers": [
            {
                "user_id": "00000000-0000-4000-8000-000000000001",
                "username": "demo",
                "qty": 1,
                "created_at": "2026-11-22T18:00:03.120000Z",
            }
        ]
    },
}
NEW_DROP = {
    "name": "Aurora Runner 'Ember'",
    "price": "199.00",
    "currency": "USD",
    "variants": [{"label": "EU 42", "total_stock": 300}, {"label": "EU 43", "total_stock": 200}],
    "starts_at": "2026-11-22T18:00:00Z",
    "max_per_user": 1,
}
