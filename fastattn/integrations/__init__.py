"""Registrations with libraries that have a place for attention of one's own."""
