"""Tags for scripts and styles that a browser runs only if they are the files we meant."""

import hashlib
from base64 import b64encode
from functools import lru_cache
from pathlib import Path

from django import template
from django.conf import settings
from django.contrib.staticfiles import finders
from django.contrib.staticfiles.storage import staticfiles_storage
from django.templatetags.static import static
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag
def stylesheet(name: str) -> SafeString:
    return format_html(
        '<link rel="stylesheet" href="{}" integrity="{}">', static(name), integrity(name)
    )


@register.simple_tag
def module(name: str, *imports: str) -> SafeString:
    """Load the ES module ``name``; ``imports`` are all others that it needs, in any depth.

    They are named because a module's own import statement can't carry a hash: the preload
    fetches and checks the file, and the import then finds it. It is also one round trip
    instead of one for each step.
    """
    preloads = format_html_join(
        "",
        '<link rel="modulepreload" href="{}" integrity="{}">',
        ((static(imported), integrity(imported)) for imported in imports),
    )
    script = '<script type="module" src="{}" integrity="{}"></script>'
    return preloads + format_html(script, static(name), integrity(name))


def integrity(name: str) -> str:
    """Return the Subresource Integrity value of the static file as it is served."""
    file = served_file(name)
    # By its time, so that a file that is being worked on is read again.
    return sha384_of(file, file.stat().st_mtime_ns)


def served_file(name: str) -> Path:
    """Return the path of what answers to ``static(name)``; see SERVESTATIC_USE_FINDERS."""
    if not settings.SERVESTATIC_USE_FINDERS:
        # A storage that puts hashes into names serves a file that may differ from its source.
        stored = getattr(staticfiles_storage, "stored_name", str)(name)
        collected = Path(staticfiles_storage.path(stored))
        if collected.exists():
            return collected
    found = finders.find(name)
    if found is None:
        raise ValueError(f"There is no static file {name!r}.")
    return Path(found)


@lru_cache(256)
def sha384_of(file: Path, changed_ns: int) -> str:
    return "sha384-" + b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()
