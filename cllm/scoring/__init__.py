"""Scoring replies: sandboxed programs and queries, and an LLM judge."""
