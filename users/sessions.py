"""Sessions of staff: Django's, in the database."""

from django.contrib.sessions.backends import db


class SessionStore(db.SessionStore):
    def _validate_session_key(self, key: str | None) -> bool:
        # A cookie can quote every character, and PostgreSQL takes no NUL: such a key is none.
        is_usable = super()._validate_session_key(key)  # type: ignore[misc]
        return bool(is_usable) and "\0" not in str(key)
