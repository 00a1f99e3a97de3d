"""Proof under faults: ``python -m tests.torture``; see docs/guarantees.md."""
