"""Every variable that the settings read is documented, and nothing else is."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings

from config.tests.test_hardening import PRODUCTION

BASE_DIR = settings.BASE_DIR
SETTINGS = BASE_DIR / "config/settings.py"

# All helpers of config.env read by ``text``.
RECORD = """
import json, os, runpy, sys
from config import env
read, names = env.text, set()
def text(name, default):
    names.add(name)
    return read(name, default)
env.text, env.load_dotenv = text, lambda path: None
for environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(environment)
    runpy.run_module("config.settings")
print(json.dumps(sorted(names)))
"""
# What one run reads depends on what it finds.
JWT = {
    **{"IDENTITY_MODE": "jwt", "JWT_AUDIENCE": "drops", "JWT_ISSUER": "us"},
    **{"JWT_KEY": "s" * 32, "JWT_ALGORITHMS": "HS256"},
}
ENVIRONMENTS = [
    {"DEBUG": "true"},
    PRODUCTION,
    PRODUCTION | JWT,
    PRODUCTION | {"IDENTITY_MODE": "header", "TRUST_IDENTITY_HEADERS": "true"},
]


@pytest.fixture(scope="module")
def names() -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", RECORD, json.dumps(ENVIRONMENTS)],
        cwd=BASE_DIR,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def literal_names() -> Iterator[str]:
    """Find the names that config/settings.py asks config.env for, in whatever branch."""
    for node in ast.walk(ast.parse(SETTINGS.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "env"
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and str(node.args[0].value).isupper()
        ):
            yield str(node.args[0].value)


def test_the_runs_of_these_tests_read_everything(names):
    assert set(literal_names()) - names == set()
    assert {"RATE_LIMIT_SOCKET_PER_ADDRESS", "DATABASE_URL", "JWT_KEY"} <= names


@pytest.mark.parametrize(
    ("document", "entry"),
    [
        (".env.example", r"^#?([A-Z][A-Z0-9_]+)="),
        ("docs/settings.md", r"^\| `([A-Z][A-Z0-9_]+)` \|"),
    ],
)
def test_documents_name_each_variable_once(names, document, entry):
    documented = re.findall(entry, Path(BASE_DIR, document).read_text(), re.MULTILINE)

    assert sorted(documented) == sorted(names)


def test_the_production_example_sets_only_what_exists(names):
    assert set(PRODUCTION) - names == set()
