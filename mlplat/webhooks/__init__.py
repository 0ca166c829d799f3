"""Outgoing webhooks: events of the registry, signed and delivered to other systems at least once."""
