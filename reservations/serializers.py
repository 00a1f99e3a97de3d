from rest_framework import serializers

from config.serializers import LARGEST_INTEGER, StrictIntegerField, StrictSerializer
from drops.models import Drop
from drops.serializers import AmountField
from reservations.models import Reservation, ReservationStatus


class ReserveInputSerializer(StrictSerializer):
    """The body of ``POST /drops/{id}/reserve``; may be empty for a drop without sizes."""

    variant = serializers.UUIDField(required=False, help_text="Needed where there are several.")
    quantity = StrictIntegerField(required=False, default=1, min_value=1, max_value=LARGEST_INTEGER)


class ReservedDropSerializer(serializers.ModelSerializer):
    class Meta:
        model = Drop
        fields = ["id", "name", "available_stock"]


class ReservationSerializer(serializers.ModelSerializer):
    """A reservation as its owner sees it; needs ``read_at`` (``read_now``) and the drop."""

    drop_id = serializers.UUIDField(read_only=True)
    variant_id = serializers.UUIDField(read_only=True)
    user_id = serializers.UUIDField(read_only=True)
    unit_price = AmountField(read_only=True)
    expires_in = serializers.SerializerMethodField(
        help_text="Seconds left by the server's clock; 0 when not active."
    )
    drop = ReservedDropSerializer(read_only=True)

    class Meta:
        model = Reservation
        fields = [
            "id",
            "drop_id",
            "variant_id",
            "user_id",
            "quantity",
            "unit_price",
            "currency",
            "status",
            "created_at",
            "expires_at",
            "expires_in",
            "drop",
        ]
        read_only_fields = fields

    def get_expires_in(self, reservation: Reservation) -> float:
        if reservation.status != ReservationStatus.ACTIVE:
            return 0.0
        left = (reservation.expires_at - reservation.read_at).total_seconds()
        return round(max(0.0, left), 3)


class ExpiredDropSerializer(serializers.Serializer):
    drop_id = serializers.UUIDField()
    available_stock = serializers.IntegerField()


class ExpiredReservationSerializer(serializers.Serializer):
    reservation_id = serializers.UUIDField()
    drop_id = serializers.UUIDField()


class ExpireNowSerializer(serializers.Serializer):
    """What a sweep returned to stock."""

    expired_count = serializers.IntegerField()
    drops = ExpiredDropSerializer(many=True)
    reservations = ExpiredReservationSerializer(many=True)
