"""Sentry and OpenTelemetry: only where their variable is set, else not even imported."""

import re
from collections.abc import Callable
from typing import Any

from django.conf import settings

from config.logs import masked, masked_value
from operations.requests import Record

# What says who asked. Their names in any spelling, as Sentry collects headers.
PERSONAL_HEADERS = re.compile(r"x-user-id|x-user-name|cookie|x-forwarded-for", re.I)
SECRET_HEADERS = re.compile(r"authorization|x-auth-signature|idempotency-key", re.I)


def start_sentry() -> None:
    """Send what is logged as an error to ``SENTRY_DSN``, without secrets and without users."""
    import sentry_sdk
    from sentry_sdk.integrations.django import DjangoIntegration

    sentry_sdk.init(
        dsn=settings.SENTRY_DSN,
        # Errors alone: what both lanes don't expect is logged, in one place (config.problems).
        traces_sample_rate=None,
        integrations=[DjangoIntegration(middleware_spans=False)],
        auto_enabling_integrations=False,
        send_default_pii=False,
        # Frames hold whole requests, and with them whatever opens doors.
        include_local_variables=False,
        max_request_body_size="never",
        before_send=clean_event,
        before_breadcrumb=lambda crumb, hint: masked_value(crumb),
    )


def clean_event(event: Any, hint: Any) -> Any:
    """Return the event with secrets masked, and without who asked, unless that is wanted."""
    request = event.get("request", {})
    request.pop("cookies", None)
    request.pop("env", None)
    headers = request.get("headers", {})
    for name in list(headers):
        is_personal = PERSONAL_HEADERS.search(name) and not settings.SENTRY_USER_IDS
        if is_personal or SECRET_HEADERS.search(name):
            headers[name] = "***"
    if not settings.SENTRY_USER_IDS:
        event.pop("user", None)
    # The name of the machine.
    event.pop("server_name", None)
    return masked_value(event)


def span_of_requests() -> Callable[[Any, Record, float, float], None]:
    """Return what makes a span of each finished request, in both lanes, and sends them in batches.

    The exporter reads its address and the other ``OTEL_`` variables by itself.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # OTEL_SERVICE_NAME, where it is set, wins over the name given here.
    provider = TracerProvider(resource=Resource.create({"service.name": "drops"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("operations.requests")
    propagator = TraceContextTextMapPropagator()

    def observe(scope: Any, record: Record, started: float, seconds: float) -> None:
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        attributes = {
            "http.request.method": scope["method"],
            "http.route": record.route,
            "http.response.status_code": record.status,
            "drops.lane": record.lane,
            "drops.code": record.code,
            "drops.request_id": masked(record.request_id),
        }
        if record.drop_id is not None:
            attributes["drops.drop_id"] = str(record.drop_id)
        span = tracer.start_span(
            f"{scope['method']} {record.route}",
            propagator.extract(carrier) if carrier else None,
            SpanKind.SERVER,
            attributes,
            start_time=int(started * 1e9),
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int((started + seconds) * 1e9))

    return observe
