from rest_framework import serializers

from config.serializers import StrictSerializer
from drops.serializers import AmountField
from purchases.models import Purchase


class PurchaseInputSerializer(StrictSerializer):
    """The body of ``POST /drops/{id}/purchase``: nothing, the reservation says it all."""


class PurchaseSerializer(serializers.ModelSerializer):
    """A purchase as its owner sees it."""

    drop_id = serializers.UUIDField(read_only=True)
    variant_id = serializers.UUIDField(read_only=True)
    reservation_id = serializers.UUIDField(read_only=True)
    user_id = serializers.UUIDField(read_only=True)
    amount = AmountField(read_only=True)

    class Meta:
        model = Purchase
        fields = [
            "id",
            "drop_id",
            "variant_id",
            "reservation_id",
            "user_id",
            "quantity",
            "amount",
            "currency",
            "status",
            "created_at",
        ]
        read_only_fields = fields
