# syntax=docker/dockerfile:1

# --- What is installed ------------------------------------------------------------------
FROM python:3.11-slim AS build

WORKDIR /app
COPY requirements.lock ./
# The environment gets no pip of its own: nothing is installed into a running container.
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --no-compile --no-deps \
        --require-hashes --only-binary=:all: -r requirements.lock
COPY . .
# Needs settings, but none of production's: no secret is here, and none stays here.
RUN DEBUG=true /venv/bin/python manage.py collectstatic --no-input \
    && /venv/bin/python -m compileall -q /venv/lib /app

# --- What runs --------------------------------------------------------------------------
FROM python:3.11-slim

RUN groupadd --system --gid 10001 drops \
    && useradd --system --uid 10001 --gid drops --no-create-home --home-dir /nonexistent drops
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Owns nothing in here, and needs to write nothing: run it with --read-only --tmpfs /tmp.
USER 10001:10001
EXPOSE 8000
# SIGTERM, then SHUTDOWN_SECONDS for what is in flight: give it 5 s more before the kill.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-m", "deploy.healthcheck"]
CMD ["python", "manage.py", "serve", "--host", "0.0.0.0", "--port", "8000"]
