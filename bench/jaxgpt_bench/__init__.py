"""Measurement: quality, speed, and the report that shows both. Nothing imports this package."""
