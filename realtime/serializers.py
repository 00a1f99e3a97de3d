"""What frames carry as ``data``: frames and the AsyncAPI document are made of the same.

Only the data of a drop's events are written by the services, while the drop is locked, which
would take fifteen times as long with these. The tests hold them against the document.
"""

from rest_framework import serializers

from drops.models import Availability
from drops.serializers import DropSerializer
from reservations.models import ReservationStatus


class SnapshotSerializer(serializers.Serializer):
    drops = DropSerializer(many=True)


class HeartbeatSerializer(serializers.Serializer):
    seqs = serializers.DictField(child=serializers.IntegerField())


class PongSerializer(serializers.Serializer):
    """Nothing."""


# --- A drop's events --------------------------------------------------------------------


class ChangedDropSerializer(serializers.Serializer):
    drop = DropSerializer()


class VariantStockSerializer(serializers.Serializer):
    id = serializers.UUIDField()
    availableStock = serializers.IntegerField()


class StockSerializer(serializers.Serializer):
    dropId = serializers.UUIDField()
    availableStock = serializers.IntegerField()
    availability = serializers.ChoiceField(choices=Availability.choices)
    soldStock = serializers.IntegerField()
    variants = VariantStockSerializer(many=True)


class ExpiredReservationSerializer(serializers.Serializer):
    dropId = serializers.UUIDField()
    reservationId = serializers.UUIDField()


class CompletedPurchaseSerializer(serializers.Serializer):
    dropId = serializers.UUIDField()
    username = serializers.CharField()
    purchasedAt = serializers.DateTimeField()
    qty = serializers.IntegerField()


class LatestPurchaserSerializer(serializers.Serializer):
    userId = serializers.UUIDField()
    username = serializers.CharField()
    qty = serializers.IntegerField()
    createdAt = serializers.DateTimeField()


class ActivitySerializer(serializers.Serializer):
    dropId = serializers.UUIDField()
    latestPurchasers = LatestPurchaserSerializer(many=True)
    soldStock = serializers.IntegerField()


# --- What only one user is told ---------------------------------------------------------


class HoldSerializer(serializers.Serializer):
    """A reservation."""

    dropId = serializers.UUIDField(source="drop_id")
    reservationId = serializers.UUIDField(source="pk")
    variantId = serializers.UUIDField(source="variant_id")
    quantity = serializers.IntegerField()
    expiresAt = serializers.DateTimeField(source="expires_at")


class HoldsSerializer(serializers.Serializer):
    holds = HoldSerializer(many=True)


class EndedHoldSerializer(HoldSerializer):
    status = serializers.ChoiceField(
        [ReservationStatus.EXPIRED, ReservationStatus.RELEASED, ReservationStatus.VOIDED]
    )


class ConfirmedPurchaseSerializer(serializers.Serializer):
    dropId = serializers.UUIDField(source="drop_id")
    purchaseId = serializers.UUIDField(source="pk")
    reservationId = serializers.UUIDField(source="reservation_id")
    variantId = serializers.UUIDField(source="variant_id")
    quantity = serializers.IntegerField()
