from http import HTTPStatus

from config.problems import Refusal


class InvalidIdentity(Refusal):
    status_code = HTTPStatus.UNAUTHORIZED
    default_code = "invalid_identity"
    default_detail = "X-User-Id must be one UUID, like 00000000-0000-4000-8000-000000000001."


class UnknownUser(Refusal):
    status_code = HTTPStatus.UNAUTHORIZED
    default_code = "unknown_user"
    default_detail = "There is no active user with this identity."


class InvalidIdempotencyKey(Refusal):
    status_code = HTTPStatus.BAD_REQUEST
    default_code = "validation_error"
    default_detail = "The request is not valid; see errors."

    def __init__(self) -> None:
        super().__init__(
            errors=[
                {
                    "field": "Idempotency-Key",
                    "code": "invalid",
                    "detail": "Must be 1 to 255 printable ASCII characters.",
                }
            ]
        )


class IdempotencyInProgress(Refusal):
    default_code = "idempotency_in_progress"
    default_detail = "A request with this Idempotency-Key is still being worked on."
    retry_after_seconds = 1


class IdempotencyKeyReused(Refusal):
    status_code = HTTPStatus.UNPROCESSABLE_ENTITY
    default_code = "idempotency_key_reused"
    default_detail = "This Idempotency-Key was used for a request with another body."
