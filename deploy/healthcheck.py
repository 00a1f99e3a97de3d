"""Exit with 0 if the web process of this container answers: ``python -m deploy.healthcheck``.

Without Django, because it runs every few seconds.
"""

import http.client
import os
import sys

PORT = 8000
TIMEOUT_SECONDS = 3


def main() -> int:
    # Only to its own names does the application answer; one of them may be a wildcard.
    host = os.environ.get("ALLOWED_HOSTS", "").split(",")[0].strip().lstrip(".*") or "localhost"
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/healthz", headers={"Host": host})
        status = connection.getresponse().status
    except OSError as exc:
        print(exc)
        return 1
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
