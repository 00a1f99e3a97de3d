from decimal import Decimal
from typing import Any

from rest_framework import serializers
from rest_framework.exceptions import ErrorDetail, ValidationError

from config.serializers import (
    LARGEST_INTEGER,
    InstantField,
    StrictCharField,
    StrictDecimalField,
    StrictIntegerField,
    StrictSerializer,
)
from drops.currencies import DECIMALS, format_amount
from drops.models import Availability, Drop, DropStatus, Variant
from users.identity import public_id

LONGEST_COOLDOWN_SECONDS = 30 * 24 * 3600


class VariantSerializer(serializers.ModelSerializer):
    class Meta:
        model = Variant
        fields = ["id", "label", "total_stock", "available_stock"]


class PurchaserSerializer(serializers.Serializer):
    user_id = serializers.UUIDField()
    username = serializers.CharField()
    qty = serializers.IntegerField()
    created_at = serializers.DateTimeField()


class ActivityFeedSerializer(serializers.Serializer):
    latest_purchasers = PurchaserSerializer(many=True)


class AmountField(serializers.CharField):
    """An amount of the object's currency, as a decimal string."""

    def get_attribute(self, instance: Any) -> str:
        amount: Any = super().get_attribute(instance)
        return format_amount(amount, instance.currency)


class DropSerializer(serializers.ModelSerializer):
    """A drop as every client sees it: in answers, in events and in snapshots.

    Needs ``read_at`` on the drop (see ``DropQuerySet.read_now``), because the status
    depends on the time.
    """

    price = AmountField(read_only=True)
    availability = serializers.ChoiceField(choices=Availability.choices, read_only=True)
    status = serializers.SerializerMethodField()
    variants = VariantSerializer(many=True, read_only=True)
    activity_feed = serializers.SerializerMethodField()

    class Meta:
        model = Drop
        fields = [
            "id",
            "name",
            "description",
            "image_url",
            "price",
            "currency",
            "total_stock",
            "available_stock",
            "availability",
            "starts_at",
            "ends_at",
            "status",
            "max_per_user",
            "hold_cooldown_seconds",
            "max_expired_holds",
            "variants",
            "seq",
            "created_at",
            "activity_feed",
        ]
        read_only_fields = fields

    def get_status(self, drop: Drop) -> DropStatus:
        return drop.status_at(drop.read_at)

    def get_activity_feed(self, drop: Drop) -> ActivityFeedSerializer:
        entries = [
            entry | {"user_id": public_id(entry["user_id"])} for entry in drop.latest_purchasers
        ]
        return {"latest_purchasers": entries}  # type: ignore[return-value]


class VariantInputSerializer(StrictSerializer):
    label = StrictCharField(max_length=50)  # type: ignore[assignment]
    total_stock = StrictIntegerField(min_value=0, max_value=LARGEST_INTEGER)


class DropInputSerializer(StrictSerializer):
    """The body of ``PATCH /drops/{id}``: what may be changed at any time. Stock is not among it.

    Rules between the fields are kept by ``drops.services``, under the drop's lock.
    """

    name = StrictCharField(max_length=200)
    description = StrictCharField(max_length=4000, allow_blank=True)
    image_url = StrictCharField(max_length=500, allow_blank=True)
    price = StrictDecimalField(max_digits=12, decimal_places=3, min_value=Decimal(0))
    starts_at = InstantField(allow_null=True)
    ends_at = InstantField(allow_null=True)
    status = serializers.ChoiceField(choices=DropStatus.choices)
    max_per_user = StrictIntegerField(min_value=1, max_value=LARGEST_INTEGER, allow_null=True)
    hold_cooldown_seconds = StrictIntegerField(
        min_value=0, max_value=LONGEST_COOLDOWN_SECONDS, allow_null=True
    )
    max_expired_holds = StrictIntegerField(min_value=1, max_value=LARGEST_INTEGER, allow_null=True)

    def validate_image_url(self, value: str) -> str:
        """Take web addresses and paths of this site; never ``javascript:`` and the like."""
        is_path = value.startswith("/") and not value.startswith("//")
        if value and not is_path and not value.startswith(("https://", "http://")):
            raise ValidationError("Must be an http(s) URL or a path of this site.", "invalid")
        if any(character.isspace() for character in value):
            raise ValidationError("Must not contain spaces.", "invalid")
        return value


class DropCreateSerializer(DropInputSerializer):
    """The body of ``POST /drops``."""

    currency = StrictCharField(default="USD", max_length=3)
    total_stock = StrictIntegerField(min_value=0, max_value=LARGEST_INTEGER, required=False)
    variants = VariantInputSerializer(many=True, required=False, allow_empty=False, max_length=50)  # type: ignore[call-arg]

    def get_fields(self) -> dict[str, serializers.Field]:
        fields = super().get_fields()
        for name in fields.keys() - {"name", "price", "currency"}:
            fields[name].required = False
        return fields

    def validate_currency(self, value: str) -> str:
        if value not in DECIMALS:
            raise ValidationError("Must be an ISO 4217 code, like USD.", "unknown_currency")
        return value

    def validate_variants(self, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
        labels = [variant["label"] for variant in variants]
        if len(set(labels)) < len(labels):
            raise ValidationError("Each label may stand only once.", "duplicate")
        if sum(variant["total_stock"] for variant in variants) > LARGEST_INTEGER:
            raise ValidationError("The sum of the stock is too large.", "max_value")
        return variants

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if "variants" in attrs:
            total = sum(variant["total_stock"] for variant in attrs["variants"])
            if attrs.setdefault("total_stock", total) != total:
                raise ValidationError(
                    {"total_stock": [ErrorDetail("Must be the variants' sum.", "not_the_sum")]}
                )
        elif "total_stock" not in attrs:
            raise ValidationError(
                {"total_stock": [ErrorDetail("This field is required.", "required")]}
            )
        return attrs
