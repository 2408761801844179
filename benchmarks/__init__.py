"""Measurements of anyfabric; each folder below is one comparison, `records/` holds what they wrote."""
